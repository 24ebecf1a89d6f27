"""Fixtures of tiny models in memory, as transformers makes them. A file of tests has each for itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def mixtral(tiny_models: ModuleType) -> Any:
    """A Mixtral of two layers, fp32."""
    return tiny_models.tiny_model("mixtral", num_hidden_layers=2)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def hf(request: pytest.FixtureRequest, tiny_models: ModuleType) -> Any:
    """A Mixtral, then a Qwen3-MoE, of two layers each, fp32."""
    return tiny_models.tiny_model(request.param, num_hidden_layers=2)
