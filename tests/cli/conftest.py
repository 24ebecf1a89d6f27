"""Fixtures for the command line: a quick model behind `load`, a private home, a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import moe_local
from support import fake_model


@pytest.fixture(scope="session")
def long_mixtral(make_checkpoint: Callable[..., Path]) -> Path:
    """As tiny_mixtral, with a context for answers that take minutes (see `endless`)."""
    return make_checkpoint("mixtral", tokenizer=True, max_position_embeddings=1 << 16)


@pytest.fixture(scope="session")
def endless() -> tuple[str, ...]:
    """Flags for an answer of `long_mixtral` that nobody sees the end of."""
    return ("-n", "60000", "--context", "65000")


@pytest.fixture
def loads() -> list[tuple[str, dict[str, Any]]]:
    """Arguments of every call of `moe_local.load` that `fake` served."""
    return []


@pytest.fixture
def fake(loads: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that `moe_local.load` gives, whatever it is asked for."""
    model = fake_model.FakeModel()

    def load(name: str, *, progress: Any = None, **options: Any) -> Any:
        loads.append((name, options))
        for done in range(3):
            progress("converting", done, 2)
        return model

    monkeypatch.setattr(moe_local, "load", load, raising=False)
    return model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MOE_LOCAL_HOME and the Hub cache, empty."""
    from huggingface_hub import constants

    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    """invoke(*arguments, input=None) -> click's Result, with stdout and stderr apart."""
    from moe_local.cli.main import main

    for name in ("VRAM", "RAM", "SLOTS", "EXPERTS", "DENSE", "CONTEXT", "SEED", "DEBUG", "TEMPERATURE"):
        monkeypatch.delenv(f"MOE_LOCAL_{name}", raising=False)

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, list(arguments), input=input)

    return run
