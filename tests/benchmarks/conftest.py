"""Fixtures for the tests of benchmarks/."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def import_benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """import_benchmark("peers.client") -> that module of benchmarks/, found as by a script there."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def tiny_checkpoint(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shape that benchmarks call mixtral-tiny."""
    folder = tmp_path_factory.mktemp("mixtral-tiny")
    synthetic.mixtral_19_shards(folder, synthetic.NAMED_SHAPES["mixtral-tiny"])
    return folder


@pytest.fixture(scope="module")
def tiny_weights(tiny_checkpoint: Path) -> dict[str, Any]:
    """Its tensors by name, float32."""
    from safetensors.torch import load_file

    shards = (load_file(path) for path in sorted(tiny_checkpoint.glob("*.safetensors")))
    return {name: tensor.float() for shard in shards for name, tensor in shard.items()}
