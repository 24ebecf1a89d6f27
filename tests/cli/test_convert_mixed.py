"""`moe-local convert --experts mixed:BITS`, with a text and without."""

from __future__ import annotations

import json

TEXT = "the expert router sends each token of the text to the experts it trusts " * 60


def test_by_a_text(invoke, home, tiny_mixtral, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    command = ("convert", str(tiny_mixtral), "--experts", "mixed:6.00", "--calibrate")
    shown = invoke(*command, str(text))
    assert shown.exit_code == 0, shown.stderr
    first, second, third = shown.stdout.splitlines()
    assert first.startswith(f"24 experts of {tiny_mixtral} in mixed:6, ")
    bits, words = second.split(" ", 1)
    assert 5.5 < float(bits) <= 6
    assert words.startswith("bits a weight: ")
    assert " in nf4" in words
    assert third.startswith("expected KL divergence 0.")
    assert third.endswith(
        " of what as many bytes dealt out evenly cost, and within 0.0 % of the least possible"
    )
    again = json.loads(invoke(*command, "-", "--json", input=TEXT).stdout)
    assert again["experts"] == "mixed:6"
    mix = again["mix"]
    assert sum(mix["formats"].values()) == again["num_experts"] == 24
    assert mix["text"] is True
    assert mix["harm"] <= mix["even_harm"]
    listed = json.loads(invoke("list", "--json").stdout)
    (mine,) = [entry for entry in listed if entry["expert_files"]]
    assert mine["expert_files"][0]["format"] == "mixed:6"
    assert mine["expert_files"][0]["formats"] == mix["formats"]
    assert "mixed:6 (" in invoke("list").stdout
    removed = invoke("rm", str(tiny_mixtral), "--yes")
    assert removed.exit_code == 0
    assert not list((home / "experts").glob("*"))  # nothing is left of what was measured, either


def test_by_the_weights_alone(invoke, home, tiny_mixtral):
    shown = invoke("convert", str(tiny_mixtral), "--experts", "mixed:7")
    assert shown.exit_code == 0, shown.stderr
    assert "of the experts' output, by the weights alone: " in shown.stdout


def test_bad_input_is_one_line(invoke, home, tiny_mixtral, tmp_path):
    text = tmp_path / "text"
    text.write_text("")
    mixed = ("convert", str(tiny_mixtral), "--experts", "mixed:6")
    for arguments, words in (
        ((*mixed, "--calibrate", str(text)), "the text to calibrate on is empty"),
        ((*mixed, "--calibrate", "-"), "the text to calibrate on is empty: stdin"),
        (("convert", "no-such-model", "--calibrate", str(text)), "the text to calibrate on is empty"),
        ((*mixed[:3], "nf4", "--calibrate", __file__), "--calibrate is for --experts mixed:BITS; nf4 is"),
        (
            (*mixed[:3], "mixed:1.2", "--calibrate", __file__),
            "bits a weight on average, which no formats give",
        ),
        ((*mixed[:3], "mixed:40"), "bits a weight on average, which no formats give"),
        ((*mixed[:3], "mixed:x"), "is not an average number of bits"),
    ):
        result = invoke(*arguments, input="")
        assert result.exit_code == 2, result.stderr
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    text.write_text("too short")
    assert "of which 512 are the least" in invoke(*mixed, "--calibrate", str(text)).stderr
    text.write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read as text" in invoke(*mixed, "--calibrate", str(text)).stderr
    assert not home.exists()
