"""`moe-local calibrate` with a real, tiny model."""

from __future__ import annotations

import json


def test_it_says_what_it_gained_and_prefetch_takes_it(invoke, home, tiny_mixtral, tmp_path):
    text = tmp_path / "text"
    text.write_text("the expert router sends each token of the text to the experts it trusts " * 100)
    arguments = ("calibrate", str(tiny_mixtral), "--text", str(text), "--tokens", "1400", "--lookahead", "1")
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("LAYERS AHEAD   RECALL OF THE ROUTER   CORRECTED\n1   ")
    assert "fitted on " in shown.stdout
    told = json.loads(invoke(*arguments, "--json").stdout)
    (recall,) = told["recall"]
    assert recall["distance"] == 1
    assert 0 < recall["router"] <= 1
    assert len(recall["by_layer"]) == 2
    assert told["fitted_tokens"] > told["judged_tokens"] > 0
    run = ("run", str(tiny_mixtral), "hello", "-n", "4", "--slots", "2", "--json", "--prefetch")
    learned = json.loads(invoke(*run, "learned").stdout)
    assert learned["token_ids"] == json.loads(invoke(*run, "off").stdout)["token_ids"]
    assert learned["stats"]["prefetch"]["state"] == "on"


def test_too_little_text_is_one_line(invoke, home, tiny_mixtral, tmp_path):
    text = tmp_path / "text"
    text.write_text("too short")
    result = invoke("calibrate", str(tiny_mixtral), "--text", str(text))
    assert result.exit_code == 2
    assert result.stderr.startswith("moe-local: ")
    assert "too few to calibrate on" in result.stderr
    for content, said in ((b"\xff\xfe\xfa", "cannot be read as text"), (b"\n", "to calibrate on is empty")):
        text.write_bytes(content)
        result = invoke("calibrate", "no-such-model-anywhere", "--text", str(text))
        assert result.exit_code == 2
        assert said in result.stderr
    assert invoke("calibrate", "no-such-model-anywhere").exit_code == 4
