"""decode.py as a command: configurations and a peer in one run, figures that add up, bad arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decode
import pytest
import together


@pytest.fixture(scope="module")
def result(run_benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with two cache sizes and transformers beside them; the table is under "table"."""
    home = tmp_path_factory.mktemp("home")
    synthetic = ("--synthetic", "mixtral-tiny", "--layers", "2", "--device", "cpu", "--peer", "transformers")
    short = ("--rounds", "2", "--tokens", "4", "--prompt-tokens", "16", "--json", str(home / "result.json"))
    *table, last = run_benchmark(
        "decode", home, *synthetic, "--slots", "2", "8", "--activations", "native", *short
    )
    document: dict[str, Any] = json.loads(last)
    assert json.loads((home / "result.json").read_text()) == document
    return {**document, "table": table}


def test_cache_sizes_are_measured_side_by_side(result: dict[str, Any]) -> None:
    few, all_resident = result["configurations"]
    assert (few["slots"]["ram"], all_resident["slots"]["ram"]) == (2, 8)
    assert few["hit_rate"] < 1 == all_resident["hit_rate"]
    assert few["bytes_per_token"]["disk"] > 0 == all_resident["bytes_per_token"]["disk"]
    for row in (few, all_resident):
        assert 0 < row["ms_per_token"]["min"] <= row["ms_per_token"]["median"] <= row["ms_per_token"]["max"]
        assert row["share_of_floor"] == row["floor_ms_per_token"] / row["ms_per_token"]["median"]


def test_weights_are_counted_alike(result: dict[str, Any]) -> None:
    """Two layers, each with two of eight experts of 3 x 64 x 128; the same weights on both sides."""
    (peer,) = result["peers"]
    ours = result["configurations"][0]
    for row in (ours, peer):
        assert row["weights"]["expert_numel"] == 2 * 2 * 3 * 64 * 128
        attention, router, norms, head = 3 * 64 * 64, 8 * 64, 2 * 64, 512 * 64
        assert row["weights"]["dense_numel"] == 2 * (attention + router + norms) + 64 + head
    assert peer["bits_per_weight"] == {"all": 16, "experts": 16, "dense": 16}
    assert 4.1 < ours["bits_per_weight"]["experts"] < 5.5  # tiny matrices pay for the padding of their parts
    ram = result["bandwidths"]["ram"]
    assert ram >= max(result["ram_bandwidth_by_round"])
    assert peer["floor_ms_per_token"] == pytest.approx(1000 * peer["read_bytes_per_token"] / ram)


def test_ratios_are_of_tokens_per_second(result: dict[str, Any]) -> None:
    """With two rounds the median is their mean, which lies between the extremes of both sides."""
    assert [(r["ours"][:7], r["peer"]) for r in result["ratios"]] == [
        ("2 slots", "transformers"),
        ("8 slots", "transformers"),
    ]
    (peer,) = result["peers"]
    for row, ratio in zip(result["configurations"], result["ratios"], strict=True):
        ms, theirs = row["ms_per_token"], peer["ms_per_token"]
        least, most = theirs["min"] / ms["max"], theirs["max"] / ms["min"]
        assert least * 0.999 <= ratio["decode"]["median"] <= most * 1.001  # rounding
        assert (ratio["decode"]["low"], ratio["decode"]["rounds"]) == (None, 2)
    assert any(line.startswith("transformers ") for line in result["table"])
    assert any("/ transformers: decode" in line for line in result["table"])


def test_a_model_by_its_folder(run_benchmark: Any, tiny_mixtral: Path, tmp_path: Path) -> None:
    short = ("--slots", "4", "--rounds", "1", "--tokens", "4")
    rows = json.loads(run_benchmark("decode", tmp_path, str(tiny_mixtral), *short)[-1])["configurations"]
    assert [row["name"] for row in rows] == [
        "4 slots, prefetch off, native",
        "4 slots, prefetch router, native",
    ]


@pytest.fixture(scope="module")
def several(run_benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two and of three sequences that are continued together."""
    home = tmp_path_factory.mktemp("home")
    model = ("--synthetic", "mixtral-tiny", "--layers", "2", "--device", "cpu", "--activations", "native")
    short = ("--rounds", "1", "--tokens", "4", "--prompt-tokens", "8", "--parallel", "2", "3")
    *table, last = run_benchmark("decode", home, *model, *short)
    document: dict[str, Any] = json.loads(last)
    return {**document, "table": table}


def test_sequences_that_are_continued_together(several: dict[str, Any]) -> None:
    """Two layers of eight experts, two a token: in each a step reads two at least, and two for each sequence
    at most."""
    assert [row["sequences"] for row in several["configurations"]] == several["parallel"] == [2, 3]
    expert, numel = several["expert_bytes"], 3 * 64 * 128
    for row in several["configurations"]:
        count, ms = row["sequences"], row["ms_per_step"]
        assert 2 * 2 <= row["experts_per_step"] <= 2 * 2 * count
        dense = row["read_bytes_per_step"] - row["experts_per_step"] * expert
        assert 0.5 * numel < dense  # attention, routers and the head: 87,360 weights in four bits
        assert row["floor_ms_per_step"] == pytest.approx(
            1000 * row["read_bytes_per_step"] / several["bandwidths"]["ram"]
        )
        assert row["tokens_per_s"]["median"] == pytest.approx(1000 * count / ms["median"])
        assert 0 <= row["as_alone"] <= count
    assert sum("sequences" in line for line in several["table"]) == 2


def test_lengths_of_prompts() -> None:
    assert together.lengths(4, 64) == [32, 43, 54, 64]
    assert together.lengths(1, 64) == [64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either MODEL or --synthetic"),
        (["demo", "--synthetic", "mixtral-tiny"], "give either MODEL or --synthetic"),
        (["demo", "--layers", "2"], "--layers 2 needs --synthetic or --made"),
        (["demo", "--made", "mixtral-8x7b"], "give either MODEL or --synthetic"),
        (["--made", "mixtral-8x7b", "--peer", "llama.cpp"], "which no peer reads; add --random-peers"),
        (["demo", "--rounds", "0"], "--rounds 0 --tokens 24 measures nothing"),
        (["demo", "--tokens", "1"], "--rounds 9 --tokens 1 measures nothing"),
        (["demo", "--parallel", "2"], "--parallel counts sequences"),
        (
            ["demo", "--isa", "avx2"],
            "--isa avx2 needs ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2",
        ),
        (["demo", "--device", "cpu", "--parallel", "0"], "--parallel counts sequences"),
        (["demo", "--device", "cpu", "--parallel", "2", "--peer", "transformers"], "no peer but llama.cpp"),
        (["demo", "--peer", "vllm"], "invalid choice: 'vllm'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        decode.main(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
