"""Fixtures for the C++ library: its instruction sets in turn, and packed.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_local.offload.native.library import ISAS, library


@pytest.fixture
def lib() -> Iterator[Any]:
    """The library; its instruction set is put back afterwards."""
    found = library()
    if found is None:
        pytest.skip("the C++ library was not compiled")
    before = found.moe_isa()
    yield found
    found.moe_set_isa(before)


@pytest.fixture(params=ISAS)
def isa(lib: Any, request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine has, in use."""
    if lib.moe_set_isa(ISAS.index(request.param)) != 0:
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C++ compiler."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(scope="session")
def sources(repository: Path) -> Path:
    return repository / "offload" / "native" / "src"
