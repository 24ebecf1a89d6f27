from __future__ import annotations

import json
import shlex

import pytest

from support import tiny_models

MIXTRAL = ("fit", "mixtral-8x7b", "--vram", "24GiB", "--ram", "64GiB", "--context", "8192")


def test_the_whole_text(invoke, home):
    result = invoke(*MIXTRAL)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout == (
        "mixtral-8x7b: MixtralForCausalLM, 46.7 B parameters (12.9 B active), "
        "32 MoE layers of 8 experts, 2 per token\n"
        "  budget      24.0 GiB VRAM, 64.0 GiB RAM\n"
        "  dense part  2.99 GiB (auto)\n"
        "  KV cache    1.00 GiB (8192 tokens)\n"
        "  workspace   1.18 GiB (prompts in chunks of 2048 tokens)\n"
        "  experts     21.7 GiB (nf4, 86.7 MiB each)\n"
        "  slots       6 or 7 in VRAM, 8 in RAM, of 8 experts per MoE layer\n"
        "  mode        offload: 86 % of the experts in VRAM, all of them in RAM\n"
        "  speed       about 22.5 tokens/s (assumed bandwidths; "
        "47.7 if all experts were in the fastest memory)\n"
    )


def test_several_answers_at_a_time(invoke, home):
    """As `serve --parallel 4` would have them."""
    lines = invoke(*MIXTRAL, "--parallel", "4").stdout.splitlines()
    assert "  KV cache    4.00 GiB (4 x 8192 tokens)" in lines
    result = invoke(*MIXTRAL, "--parallel", "40", "--slots", "2")
    assert result.exit_code == 3
    assert "does not fit: dense part, 40 x 8192 tokens of context and 2 experts a layer" in result.stderr


def test_a_mix_says_what_it_is_of(invoke, home):
    result = invoke(*MIXTRAL, "--dense", "int8", "--experts", "auto")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "  experts     20.0 GiB (mixed:3.82, up to 86.7 MiB each)" in lines
    (mix,) = (line for line in lines if line.startswith("  mix  "))
    assert mix.startswith("  mix         3.82 bits a weight: 64 % nf4, 36 % q3 (perplexity up some ")
    assert "  mode        resident: all experts stay in VRAM" in lines
    assert "  slots       8 in VRAM, of 8 experts per MoE layer" in lines
    assert lines[-1].endswith(" tokens/s (assumed bandwidths)")


def test_json(invoke, home):
    result = invoke(*MIXTRAL, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["fits"] is True
    assert document["mode"] == "offload"
    assert set(document["bytes"]) == {"dense", "kv", "snapshots", "workspace", "expert", "experts_total"}
    assert document["slots"] == {"vram": 6, "ram": 8}
    assert document["experts_resident_fraction"] == 220 / 256
    assert 0 < document["tokens_per_s_estimate"] < document["tokens_per_s_if_resident"]
    assert document["tokens_per_s_if_resident"] < document["tokens_per_s_roofline"]
    assert document["assumed"] is True


@pytest.mark.parametrize(("vram", "mode"), [("48GiB", "resident"), ("24GB", "offload")])
def test_cards(invoke, home, vram, mode):
    result = invoke("fit", "mixtral-8x7b", "--vram", vram, "--ram", "64GiB", "--json")
    assert json.loads(result.stdout)["mode"] == mode


def test_two_cards_are_told_one_by_one(invoke, home):
    result = invoke("fit", "mixtral-8x7b", "--vram", "2x12GiB", "--ram", "64GiB")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[1] == "  budget      12.0 GiB + 12.0 GiB VRAM, 64.0 GiB RAM"
    assert lines[6] == "  card 0      layers 0 to 15, 6 or 7 experts per MoE layer, 12.0 GiB in all"
    assert lines[7] == "  card 1      layers 16 to 31, 6 or 7 experts per MoE layer, 12.0 GiB in all"
    found = json.loads(invoke("fit", "mixtral-8x7b", "--vram", "2x12GiB", "--json").stdout)
    assert [card["layers"] for card in found["cards"]] == [[0, 15], [16, 31]]
    assert sum(card["used"] for card in found["cards"]) == found["used"]["vram"]


def test_cards_that_cannot_be_are_one_line(invoke, home):
    result = invoke("fit", "mixtral-8x7b", "--vram", "2x12GiB,none")
    assert result.exit_code == 2
    assert result.stderr == (
        "moe-local: vram 'none' is not a size; write for example 20GiB, 512MiB or 1.5GB\n"
    )


def test_disk_mode_fits(invoke, home):
    result = invoke("fit", "mixtral-8x7b", "--vram", "24GiB", "--ram", "12GiB", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["mode"] == "disk"


def test_what_does_not_fit_says_by_how_much_and_what_does(invoke, home):
    flags = ["--vram", "6GiB", "--ram", "64GiB", "--context", "32768"]
    result = invoke("fit", "mixtral-8x7b", *flags)
    assert result.exit_code == 3
    assert "fits        no, " in result.stdout
    assert result.stderr.startswith("moe-local: mixtral-8x7b does not fit")
    assert result.stderr.count("\n") == 1
    document = invoke("fit", "mixtral-8x7b", *flags, "--json")
    assert document.exit_code == 3
    plan = json.loads(document.stdout)
    assert plan["fits"] is False
    assert plan["shortfall_bytes"] > 2**30
    assert plan["nearest"] in result.stderr
    assert invoke("fit", "mixtral-8x7b", *flags, *shlex.split(plan["nearest"])).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["mixtral-8x7"], 4, "did you mean mixtral-8x7b"),
        (["mixtral-8x7b", "--vram", "much"], 2, "vram 'much' is not a size"),
        (["mixtral-8x7b", "--vram", "24GiB", "--slots", "1"], 2, "slots 1 is below the 2 experts"),
        (["mixtral-8x7b", "--vram", "24GiB", "--experts", "q4"], 2, "use one of nf4"),
        (["mixtral-8x7b", "--vram", "24GiB", "--context", "99999"], 2, "beyond the 32768 tokens"),
        (["mixtral-8x7b", "--vram", "24GiB", "--device", "cpu"], 2, "leave one of them out"),
    ],
)
def test_bad_input(invoke, home, arguments, code, said):
    result = invoke("fit", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


def test_a_dense_model(invoke, home, tmp_path):
    tiny_models.tiny_config("llama").save_pretrained(tmp_path)
    result = invoke("fit", str(tmp_path))
    assert result.exit_code == 1
    assert "no routed experts" in result.stderr
