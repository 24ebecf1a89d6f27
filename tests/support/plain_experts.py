"""transformers' own experts behind OffloadedExperts: tiny models whose experts run between captures."""

from __future__ import annotations

from typing import Any

import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.checkpoint.skeleton import replace_experts
from moe_local.offload.experts import OffloadedExperts


class Plain:
    """A runner of transformers' own experts. Each call waits for the router's choice, and may be made to
    fail."""

    def __init__(self, originals: list[Any]) -> None:
        self.originals = originals
        """The experts of each MoE layer."""
        self.calls: list[int] = []
        self.fail_in: int | None = None
        """After this many calls, the next one raises `error`."""
        self.error: type[BaseException] = MoeLocalError

    def run(self, experts: OffloadedExperts, hidden: Any, index: Any, weights: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise self.error("in the middle")
        self.calls.append(experts.index)
        index.tolist()
        answer: torch.Tensor = self.originals[experts.index](hidden, index, weights)
        return answer


def offloaded(hf: Any) -> Any:
    """The model, with its experts replaced by OffloadedExperts, which `hf.runner` runs."""
    hf.runner = Plain(replace_experts(hf))
    for module in hf.modules():
        if isinstance(module, OffloadedExperts):
            module.attach(hf.runner)
    return hf
