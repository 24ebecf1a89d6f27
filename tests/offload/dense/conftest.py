"""What tests of decoder layers that are computed together have in common."""

from __future__ import annotations

from typing import Any

import pytest

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
