"""Tiny models in memory, as transformers makes them, each file's its own; and what ours must equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from support import tiny_models


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """A Mixtral of two layers, fp32."""
    return tiny_models.tiny_model("mixtral", num_hidden_layers=2)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def hf(request: pytest.FixtureRequest) -> Any:
    """A Mixtral, then a Qwen3-MoE, of two layers each, fp32."""
    return tiny_models.tiny_model(request.param, num_hidden_layers=2)


@pytest.fixture(scope="session")
def check_like() -> Callable[[Any, Path], None]:
    """check_like(hf, folder): the checkpoint there gives transformers' greedy ids, and has its dense weights.

    It is loaded in fp32, with fewer slots than experts.
    """

    def check(hf: Any, folder: Path) -> None:
        prompt = torch.randint(3, 320, (1, 11), generator=torch.Generator().manual_seed(1))
        options = {"max_new_tokens": 8, "eos_token_id": None}
        with torch.inference_mode():
            expected = hf.generate(prompt, do_sample=False, **options)
        with moe_local.load(folder, slots=3, experts="fp32", dense="fp32", context=64) as model:
            assert torch.equal(model.generate(prompt, **options), expected)
            assert model.stats().misses > 0
            wanted = hf.state_dict()
            for name, weight in model.hf.state_dict().items():
                assert torch.equal(weight, wanted[name]), name
            model.check_integrity()

    return check
