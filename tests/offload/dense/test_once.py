"""What is computed once for all layers of a forward."""

from __future__ import annotations

import torch

from moe_local.offload.dense.once import once_for_all_layers

calls: list[int] = []


@once_for_all_layers
def doubled(x: torch.Tensor, count: int) -> torch.Tensor:
    calls.append(count)
    return 2 * x[:count]


def test_the_same_is_computed_once() -> None:
    x = torch.arange(4.0)
    first = doubled(x, 2)
    calls.clear()
    assert doubled(x, 2) is first
    assert not calls


def test_everything_else_is_computed_anew() -> None:
    x = torch.arange(4.0)
    doubled(x, 2)
    calls.clear()
    assert doubled(x, 3).tolist() == [0, 2, 4]
    assert doubled(x.clone(), 3).tolist() == [0, 2, 4]
    assert len(calls) == 2
    other = torch.arange(4.0)
    doubled(other, 3)
    other.add_(1)
    assert doubled(other, 3).tolist() == [2, 4, 6]
    assert len(calls) == 4


def test_tensors_without_versions_serve_as_well() -> None:
    with torch.inference_mode():
        x = torch.arange(4.0)
        first = doubled(x, 2)
        assert doubled(x, 2) is first
