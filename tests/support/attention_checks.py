"""Checks for every implementation of attention: it makes no large tensors, and ids equal transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import moe_local
from moe_local.offload.engine.sampling import make_settings

PROMPT = list(range(3, 45))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest new tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in function._schema.returns):
            new = [x.numel() for x in tree_flatten(result)[0] if torch.is_tensor(x)]
            self.numel = max([self.numel, *new])
        return result


def check_ids(model: moe_local.Model, plain: Any) -> None:
    """Check that greedy ids of `model`, which has two rows, equal those of `plain`, a transformers model.

    Checks one sequence alone, and two sequences of different lengths that step together.
    """
    engine = model.parts.engine
    for prompts in ([PROMPT], [PROMPT, PROMPT[5:20]]):
        settings = make_settings(model.hf, [1], max_new_tokens=20, do_sample=False, eos_token_id=None)
        sequences = [engine.join(prompt, settings) for prompt in prompts]
        while any(sequence.finish_reason is None for sequence in sequences):
            engine.step()
        for prompt, sequence in zip(prompts, sequences, strict=True):
            ids = torch.tensor([prompt])
            want = plain.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
            assert sequence.new_ids == want[0, len(prompt) :].tolist()
            engine.leave(sequence)
