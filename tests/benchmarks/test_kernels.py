"""kernels.py on tiny matrices: every kernel checked and timed beside its peers, and judged by its targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kernel_cases
import kernel_targets
import kernel_weights
import kernels
import pytest
import torch

from moe_local.offload.native.library import ISAS, library, loaded_library

WIDTH, HIDDEN = 128, 192
ROUNDS = 6


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """kernels.py for a processor with a tiny cache; the process' settings are put back."""
    lib = library()
    if lib is None:
        pytest.skip("the C++ library was not compiled")
    monkeypatch.setattr(kernel_weights, "last_cache_bytes", lambda: 2**16)
    monkeypatch.setattr(kernels, "READ_BYTES", 2**18)
    isa, threads = lib.moe_isa(), torch.get_num_threads()
    yield kernels
    assert lib.moe_set_isa(isa) == 0
    torch.set_num_threads(threads)


def run(benchmark: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON object, with the lines above it under "table"."""
    sizes = ("--width", str(WIDTH), "--hidden", str(HIDDEN), "--rounds", str(ROUNDS), "--threads", "2")
    assert benchmark.main([*sizes, *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return {**json.loads(last), "table": table}


def test_every_kernel_is_timed_beside_its_peers(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = run(benchmark, capsys, "--tokens", "1", "3", "16", "--json", str(tmp_path / "result.json"))
    table = result.pop("table")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    isas = ISAS[: loaded_library().moe_best_isa() + 1]
    rows = {(r["kernel"], r["by"], r["activations"], r["tokens"]): r for r in result["cases"]}
    assert len(rows) == len(result["cases"]) == 3 * (6 * 3 + 3 + 2) * len(isas) + 2 * 3 + 2 + 2
    for (kernel, _, activations, tokens), row in rows.items():
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["copies"] * row["read_bytes"] >= 4 * 2**16, "the cache holds its weights"
        assert row["error"] < {"fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}[activations]
        up, down = 2 * HIDDEN * WIDTH, WIDTH * HIDDEN
        experts = 2 if tokens == 1 else 1
        assert row["weights"] == (experts * (up + down) if "expert" in kernel else up)
    bits = {kernel: 8 * r["read_bytes"] / r["weights"] for (kernel, by, *_), r in rows.items() if by in isas}
    assert bits == pytest.approx(
        {"expert": 4.127, "nf4 matrix": 4.127, "int8 matrix": 8.25}
        | {"q3 expert": 3.472, "q2 expert": 2.723}
        | {"int8 expert": 8.25, "mxfp4 expert": 4.25, "fp8 expert": 8.002},
        rel=2e-3,
    )  # and 32 bits for each short row
    assert rows["expert", "portable", "int8", 3]["error"] > 1e-4  # rounded, as asked
    kernels = ("expert ", "nf4 ", "int8 ", "q3 expert ", "q2 expert ", "mxfp4 expert", "fp8 expert ")
    assert len([line for line in table if line.startswith(kernels)]) == len(rows)


def test_a_token_goes_to_as_many_experts_as_wanted(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--experts", "6", "--tokens", "1", "2", "--kernels", "q3 expert", "--peers")
    rows = run(benchmark, capsys, *wanted, "--isas", "portable")["cases"]
    one = 3 * WIDTH * HIDDEN
    assert {(row["tokens"], row["weights"]) for row in rows} == {(1, 6 * one), (2, one)}
    assert all(row["copies"] >= 6 for row in rows)


def test_targets_are_judged_by_the_rows(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(benchmark, capsys, "--tokens", "1", "16", "--kernels", "expert", "--peers", "torch fp32")
    rows = {(r["by"], r["activations"], r["tokens"]): r for r in result["cases"]}
    fast = [isa for isa in ISAS if isa != "portable" and (isa, "int8", 1) in rows]
    assert len(result["targets"]) == 6 * len(fast)
    for verdict in result["targets"]:
        row = rows[verdict["isa"], verdict["activations"], verdict["tokens"]]
        assert verdict["paired"] == row[verdict["figure"]]
        assert verdict["best"] == row[f"best_{verdict['figure']}"]
    assert len([line for line in result["table"] if "; target at " in line]) == len(result["targets"])


@pytest.mark.parametrize(("rounds", "fewest"), [(3, 3), (11, 11), (12, 6), (32, 8), (48, 6)])
def test_slow_cases_are_timed_in_fewer_rounds(
    benchmark: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    fewest: int,
) -> None:
    """With every case slow, in as few as still give an interval; and always in the same ones."""
    monkeypatch.setattr(benchmark, "SLICE_S", 1e-9)
    few = ("--tokens", "16", "--kernels", "expert", "--isas", "portable", "--peers", "torch fp32")
    rows = run(benchmark, capsys, *few, "--rounds", str(rounds))["cases"]
    assert {row["rounds"] for row in rows} == {fewest}
    assert {row["times_torch"]["rounds"] for row in rows if row["times_torch"]} == {fewest}


@pytest.mark.parametrize(
    ("figure", "limit", "paired", "outcome"),
    [
        ("share_of_read", 0.9, (0.95, 0.91, 0.97), (True, True)),
        ("share_of_read", 0.9, (0.95, 0.89, 0.97), (True, False)),
        ("share_of_read", 0.9, (0.85, 0.8, 0.89), (False, True)),
        ("share_of_read", 0.9, (0.95, None, None), (True, False)),
        ("times_torch", 1.5, (1.4, 1.3, 1.5), (True, True)),
        ("times_torch", 1.5, (1.6, 1.4, 1.7), (False, False)),
        ("times_torch", 1.5, (1.6, 1.51, 1.7), (False, True)),
    ],
)
def test_verdicts(
    figure: str, limit: float, paired: tuple[float, float | None, float | None], outcome: tuple[bool, bool]
) -> None:
    tokens = 1 if figure == "share_of_read" else 16
    ratio = dict(zip(("median", "low", "high"), paired, strict=True))
    row = {
        "kernel": "expert",
        "by": "avx2",
        "activations": "int8",
        "tokens": tokens,
        "share_of_read": None,
        "times_torch": None,
        figure: ratio,
        f"best_{figure}": 0.5,
    }
    (verdict,) = kernel_targets.verdicts([row, {**row, "by": "torch fp32"}, {**row, "by": "portable"}])
    assert (verdict["holds"], verdict["certain"]) == outcome
    assert (verdict["target"], verdict["best"]) == (limit, 0.5)


def test_a_wrong_kernel_is_not_timed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel_cases.cpu_linear

    def wrong(*arguments: Any) -> Callable[[torch.Tensor, str], torch.Tensor]:
        linear = real(*arguments)
        return lambda x, name: 1.001 * linear(x, name)

    monkeypatch.setattr(kernel_cases, "cpu_linear", wrong)
    with pytest.raises(
        SystemExit, match=r"nf4 matrix by portable, fp32, 1 tokens: error 0\.001, above 1e-05"
    ):
        benchmark.main(["--width", "64", "--hidden", "64", "--kernels", "nf4 matrix", "--tokens", "1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--threads", "0"], "--threads 0 measures nothing"),
        (["--tokens", "4", "0"], "--tokens 0 is no batch"),
        (["--hidden", "100"], "--hidden 100 is no multiple of 64"),
        (["--isas", "neon"], "invalid choice: 'neon'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        benchmark.main(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
