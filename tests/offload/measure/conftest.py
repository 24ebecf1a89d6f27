"""A tiny model with few slots, for the tests of measuring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_local


@pytest.fixture(scope="package", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="package")
def loaded(tiny_mixtral: Path, _home: None) -> Iterator[moe_local.Model]:
    with moe_local.load(tiny_mixtral, device="cpu", slots=3, context=640, prefetch="router") as model:
        yield model


@pytest.fixture
def model(loaded: moe_local.Model) -> Iterator[moe_local.Model]:
    """3 layers of 8 experts, top-2, 3 slots; left as it was found, which is checked."""
    yield loaded
    loaded.check_integrity()
