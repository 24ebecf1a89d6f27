"""What tests of this folder have in common."""

from __future__ import annotations

from typing import Any

import pytest

from moe_local.offload.dense import attention, sink_attention
from moe_local.offload.dense.token_layers import TokenLayers


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the library has computed."""
    made: list[int] = []
    compute = TokenLayers._compute

    def noting(self: TokenLayers, *args: Any) -> Any:
        ahead = compute(self, *args)
        if ahead is not None:
            made.append(len(ahead.outputs))
        return ahead

    monkeypatch.setattr(TokenLayers, "_compute", noting)
    return made


@pytest.fixture
def torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries go to torch, as where the library was not compiled."""
    for module in (attention, sink_attention):
        monkeypatch.setattr(module, "prompt_attention", lambda *args, **options: None)


@pytest.fixture(params=["library", "torch"])
def attends(request: pytest.FixtureRequest) -> str:
    """Both ways in which many queries are computed."""
    if request.param == "torch":
        request.getfixturevalue("torch_attends")
    return str(request.param)
