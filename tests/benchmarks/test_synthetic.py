"""The writer of synthetic Mixtral checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic
from safetensors import safe_open


@pytest.fixture(scope="module")
def shape() -> Any:
    return synthetic.Shape(16, 32, layers=2, heads=4, kv_heads=2, vocab=64)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layout_is_the_published_one(shape: Any, tmp_path: Path) -> None:
    total = synthetic.mixtral_19_shards(tmp_path, shape)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{number:05d}-of-00019.safetensors" for number in range(1, 20)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == 2 * (4 + 1 + 8 * 3 + 2) + 3
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / name, "pt") as shard:
            assert shard.get_slice(key).get_dtype() == "BF16"


def test_true_sizes_are_those_of_mixtral() -> None:
    """metadata.total_size of mistralai/Mixtral-8x7B-Instruct-v0.1."""
    sizes = [synthetic._nbytes(shape) for _, shape in synthetic.Shape().tensors()]
    assert sum(sizes) == 93_405_585_408


def test_same_seed_same_bytes(shape: Any, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.mixtral_19_shards(tmp_path / folder, shape, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_goes_on_after_an_interruption(shape: Any, tmp_path: Path) -> None:
    synthetic.mixtral_19_shards(tmp_path, shape, 1)
    whole = contents(tmp_path)
    kept = (tmp_path / "model-00001-of-00019.safetensors").stat().st_mtime_ns
    (tmp_path / "model-00009-of-00019.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    synthetic.mixtral_19_shards(tmp_path, shape, 1)
    assert contents(tmp_path) == whole
    assert (tmp_path / "model-00001-of-00019.safetensors").stat().st_mtime_ns == kept
    synthetic.mixtral_19_shards(tmp_path, shape, 2)
    assert contents(tmp_path) != whole


def test_too_few_tensors_for_19_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot fill 19 shards"):
        synthetic.mixtral_19_shards(tmp_path, synthetic.Shape(16, 32, layers=1, experts=1, heads=4))
