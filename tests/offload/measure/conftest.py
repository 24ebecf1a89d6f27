"""A tiny model with few slots, for the tests of measuring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_local


@pytest.fixture(scope="package", autouse=True)
def home_of_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of all files of this folder, for a model that outlives each."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LOCAL_HOME", str(folder))
        yield folder


@pytest.fixture(scope="package")
def loaded(tiny_mixtral: Path, home_of_file: Path) -> Iterator[moe_local.Model]:
    with moe_local.load(tiny_mixtral, device="cpu", slots=3, context=640, prefetch="router") as model:
        yield model


@pytest.fixture
def model(loaded: moe_local.Model) -> Iterator[moe_local.Model]:
    """3 layers of 8 experts, top-2, 3 slots; left as it was found, which is checked."""
    yield loaded
    loaded.check_integrity()
