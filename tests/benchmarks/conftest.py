"""Fixtures for the tests of benchmarks/."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic

from moe_local.offload.plan import bandwidth


@pytest.fixture
def finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """finished("encode", *arguments) -> the object that it printed last, which a file holds as well."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))

    def finished(name: str, *arguments: str) -> dict[str, Any]:
        file = tmp_path / "result.json"
        importlib.import_module(name).main([*arguments, "--json", str(file)])
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads(file.read_text()) == document
        return document

    return finished


@pytest.fixture(scope="module")
def run_benchmark(repository: Path) -> Callable[..., list[str]]:
    """run_benchmark("decode", home, *arguments) -> the lines it prints, with its home below MOE_LOCAL_HOME.

    The script as a command, but in this process, which has torch already, and measuring bandwidths briefly.
    """

    def run(name: str, home: Path, *arguments: str) -> list[str]:
        script = repository / "benchmarks" / f"{name}.py"
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.syspath_prepend(str(script.parent))
            patch.setenv("MOE_LOCAL_HOME", str(home))
            patch.setattr(bandwidth, "SECONDS", 0.02)
            brief = functools.partial(bandwidth.disk_bandwidth, nbytes=bandwidth.DISK_PIECE)
            patch.setattr(bandwidth, "disk_bandwidth", brief)
            runpy.run_path(str(script), run_name="__main__")
        return printed.getvalue().splitlines()

    return run


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
