"""One token through Mamba-2's layers, against transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as transformers_module

from moe_local.offload.dense.convolution import (
    CONVOLUTION,
    PROMPT_CONVOLUTION,
    convolve,
    convolve_sequences,
)
from moe_local.offload.dense.state_steps import UPDATE, stepping, update_state

usual_update: Any = getattr(transformers_module, UPDATE, None)

pytestmark = pytest.mark.skipif(usual_update is None, reason="this transformers computes them in the layer")

BATCH, HEADS, WIDTH, STATE = 2, 6, 8, 16


def never(*args: Any, **options: Any) -> torch.Tensor:
    raise AssertionError("transformers' own function was called")


def step(groups: int, dtype: torch.dtype, **changed: Any) -> dict[str, Any]:
    """Arguments as a layer gives them: one number a head, expanded."""
    torch.manual_seed(groups)
    each = {name: torch.randn(HEADS) for name in ("A", "D", "dt_bias")}
    return {
        "state": torch.randn(BATCH, HEADS, WIDTH, STATE),
        "hidden_states": torch.randn(BATCH, HEADS, WIDTH).to(dtype),
        "dt": torch.randn(BATCH, HEADS, 1).to(dtype).expand(-1, -1, WIDTH),
        "A": (-each["A"].exp())[:, None, None].expand(-1, WIDTH, STATE),
        "B": torch.randn(BATCH, groups, STATE).to(dtype),
        "C": torch.randn(BATCH, groups, STATE).to(dtype),
        "D": each["D"][:, None].expand(-1, WIDTH),
        "z": None,
        "dt_bias": each["dt_bias"][:, None].expand(-1, WIDTH),
        "dt_softplus": True,
    } | changed


@pytest.mark.parametrize("groups", [1, 3, HEADS])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("changed", [{}, {"D": None}, {"dt_bias": None}, {"dt_softplus": False}])
def test_a_step_and_the_state_after_it(
    groups: int, dtype: torch.dtype, allowed: float, changed: dict[str, Any]
) -> None:
    mine, theirs = step(groups, dtype, **changed), step(groups, dtype, **changed)
    got, wanted = update_state(never, **mine), usual_update(**theirs)
    assert got.dtype is dtype
    for a, b in ((got, wanted), (mine["state"], theirs["state"])):
        assert float((a.float() - b.float()).norm() / b.float().norm()) <= allowed
    assert not torch.equal(mine["state"], step(groups, dtype)["state"]), "it is overwritten"


@pytest.mark.parametrize(
    "changed",
    [
        {"z": torch.randn(BATCH, HEADS, WIDTH)},
        {"dt": torch.randn(BATCH, HEADS, WIDTH)},
        {"A": -torch.rand(HEADS, WIDTH, STATE)},
        {"A": (-torch.rand(HEADS, WIDTH, 1)).expand(-1, -1, STATE)},
        {"D": torch.randn(HEADS, WIDTH)},
        {"dt_bias": torch.randn(HEADS, WIDTH)},
        {"state": torch.randn(BATCH, HEADS, WIDTH, STATE).to(torch.bfloat16)},
    ],
)
def test_other_steps_are_left_to_transformers(changed: dict[str, Any]) -> None:
    mine, theirs = (
        {k: v.clone() if k == "state" else v for k, v in step(2, torch.float32, **changed).items()}
        for _ in "12"
    )
    assert torch.equal(update_state(usual_update, **mine), usual_update(**theirs))
    assert torch.equal(mine["state"], theirs["state"])
    with pytest.raises(AssertionError, match="own function"):
        update_state(never, **mine)


def test_the_library_convolves() -> None:
    forward: Any = stepping(transformers_module.GraniteMoeHybridMambaLayer)
    functions = {name: forward.__globals__[name].func for name in (CONVOLUTION, PROMPT_CONVOLUTION)}
    assert functions == {CONVOLUTION: convolve, PROMPT_CONVOLUTION: convolve_sequences}


def test_only_layers_that_step_so_are_changed() -> None:
    assert stepping(transformers_module.GraniteMoeHybridMambaLayer) is not None
    assert stepping(nn.Linear) is None
