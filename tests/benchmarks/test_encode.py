"""encode.py and conversion.py, at sizes that tell nothing but that their figures belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import encode
import pytest
import torch

from moe_local.offload.native.library import ISAS, library


def test_everybody_encodes_the_same_bytes(finished: Callable[..., dict[str, Any]]) -> None:
    compiled = library()
    isas = set() if compiled is None else {*ISAS[: compiled.moe_best_isa() + 1]}
    gpu = {"cuda"} if torch.cuda.is_available() else set()
    size = ("--rows", "70", "--cols", "192", "--rounds", "2")
    document = finished("encode", *size, "--dtypes", "bf16", "fp16", "fp32")
    assert set(document["dtypes"]) == {"bf16", "fp16", "fp32"}
    for table in document["dtypes"].values():
        assert set(table) == {*isas, *gpu, "torch", "bitsandbytes", "read", *(["blocks"] if isas else [])}
        for name, row in table.items():
            assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
            assert ("times_faster" in row) == (name in {*isas, *gpu, "torch"})


def test_other_bytes_end_it(finished: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encode.by_bitsandbytes

    def other(weights: Any) -> Any:
        q, *scales = plain(weights)
        return (q ^ 1, *scales)

    monkeypatch.setattr(encode, "by_bitsandbytes", other)
    with pytest.raises(SystemExit, match="does not encode to the bytes of bitsandbytes"):
        finished("encode", "--rows", "2", "--cols", "64", "--rounds", "1")


def test_a_conversion_and_its_floor(finished: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """They move the same bytes, and nothing but the checkpoint is left."""
    document = finished("conversion", "--synthetic", "mixtral-tiny", "--layers", "2", "--rounds", "2")
    assert (document["layers"], document["experts"], len(document["rounds"])) == (2, 16, 2)
    for found in document["rounds"]:
        assert found["bytes_read"] == 16 * 3 * 64 * 128 * 2
        assert found["bytes_written"] % 4096 == 0
        assert all(seconds > 0 for seconds in found["busy_seconds"].values())
        assert found["seconds"] > found["busy_seconds"]["encode"]  # which is done in the same thread
        assert found["floor_seconds"] > 0
    assert [path.name for path in (tmp_path / "benchmarks").iterdir()] == ["mixtral-tiny-2-layers"]
