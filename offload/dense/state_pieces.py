"""Computes prompts a piece at a time in layers that keep a state in place of keys and values.

transformers' own scans of such layers hold, in fp32, some numbers or the whole state for every token: for
2048 tokens 0.5 GiB in Qwen3-Next, 4 GiB in Jamba, and more than 10 GiB in Granite's Mamba-2. To continue, a
layer needs only the last state, so memory need not grow with the prompt. Where the library computes Mamba-2
(see mamba2), pieces can be long, for they cost nothing but what goes in and comes out.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.logits_trial import difference
from moe_local.offload.dense.mamba2 import holds_no_states
from moe_local.offload.modeling.class_source import class_source
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.modeling.stand_in import calling, set_class, stand_in

LONGEST = 512
"""Most tokens in a piece: enough to keep a GPU busy, and a multiple of the block size of delta rules."""
SHORTEST = 16
PIECE_BYTES = 64 * 2**20
"""Bytes that a scan which holds the state after each token may take for these states."""

SCAN = "mamba_selective_scan"
"""transformers' scan (Jamba), which starts from zero and ignores the state: `selective_scan` replaces it."""

logger = logging.getLogger(__name__)


def use_state_pieces(model: Any) -> None:
    """Let the layers of a transformers model that keep a state compute prompts in pieces.

    A trial finds out whether the logits stay the same: see `difference`.
    """
    modules = [m for m in model.modules() if _keeps_state(m) and not hasattr(m, "piece")]
    if not modules:
        return
    classes: list[Any] = [type(module) for module in modules]
    blocks = [getattr(module, "chunk_size", None) for module in modules]

    def change() -> None:
        for module, cls in zip(modules, classes, strict=True):
            set_class(module, in_pieces(cls))
            module.piece = 2

    reason = difference(model, change)
    for module, cls, block in zip(modules, classes, blocks, strict=True):
        if reason is not None:
            set_class(module, cls)
            vars(module).pop("piece", None)  # none where the trial ended before the change
            continue
        module.piece = piece_tokens(module)
        if isinstance(block, int):  # Mamba-2: blocks are padded, and their memory grows with the square
            module.chunk_size = min(block, module.piece)
    if reason is not None:
        logger.info("prompts go through layers with a state in one piece: %s", reason)


def forgets_states(model: nn.Module) -> bool:
    """Whether a layer of the model starts from a zero state whenever it gets several tokens, so that a prompt
    has to be computed in one forward."""
    return any(f"{SCAN}(" in _source(module) and not hasattr(module, "piece") for module in model.modules())


def piece_tokens(module: Any) -> int:
    """The number of tokens that a layer computes at a time."""
    state = state_numel(module) if hasattr(module, "ssm_state_size") else 0
    if not state or holds_no_states(module):
        return LONGEST
    fit = PIECE_BYTES // (4 * state)
    return min(LONGEST, max(SHORTEST, fit - fit % SHORTEST))


def state_numel(module: Any) -> int:
    """Size, in numbers, of the recurrent state that a layer keeps per sequence; 0 if it only convolves."""
    if hasattr(module, "ssm_state_size"):
        return int(module.intermediate_size * module.ssm_state_size)
    names = ("num_v_heads", "head_k_dim", "head_v_dim")
    if not hasattr(module, names[0]):  # Kimi Linear's
        names = ("num_heads", "head_dim", "head_dim")
    return math.prod(getattr(module, name, 0) for name in names)


def kept_numel(model: nn.Module) -> int:
    """How many numbers a model's layers with a state keep per sequence, whatever its length. The model may be
    on the meta device."""
    kept = 0
    for module in model.modules():
        if _keeps_state(module):
            convolutions = (part for part in module.children() if isinstance(part, nn.Conv1d))
            kept += state_numel(module) + sum(
                part.out_channels * part.kernel_size[0] for part in convolutions
            )
    return kept


def _keeps_state(module: Any) -> bool:
    source = _source(module)
    return ".update_conv_state(" in source or ".update_recurrent_state(" in source


def _source(module: Any) -> str:
    cls: Any = type(module)
    return class_source(cls)


@cache
def in_pieces(cls: Any) -> Any:
    """A subclass of a class of layers with a state that computes `piece` tokens at a time.

    Without a cache, in training, and where all past states are asked for, the layer's own forward runs:
    without a cache there is nothing to keep the state between pieces.
    """
    name = cache_name(cls.forward)
    go_on = _remembering(cls, name) or cls.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        memory, mask, tokens = kwargs.get(name), kwargs.get("attention_mask"), hidden_states.shape[1]
        if memory is None or args or torch.is_grad_enabled() or memory.layers[self.layer_idx].record_past:
            whole: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return whole
        if tokens <= self.piece or (mask is not None and mask.shape != hidden_states.shape[:2]):
            answer: torch.Tensor = go_on(self, hidden_states, **kwargs)
            return answer
        answers = torch.empty_like(hidden_states)
        for first in range(0, tokens, self.piece):
            part = slice(first, first + self.piece)
            if mask is not None:
                kwargs["attention_mask"] = mask[:, part]
            given = hidden_states[:, part]
            # Without the strides of the whole, for which torch copies a linear layer's weights at each call.
            given = given.flatten(0, 1).view(given.shape)
            answers[:, part] = go_on(self, given, **kwargs)
        return answers

    return stand_in(cls, in_pieces, forward)


def _remembering(cls: Any, name: str) -> Callable[..., Any] | None:
    """The forward of a class with `selective_scan` in place of the scan that starts from zero.

    None if the class does not use that scan, or if mamba_ssm is installed, whose kernel needs little memory.
    """
    whole: Any = inspect.unwrap(cls.forward)
    if SCAN not in whole.__code__.co_names or importlib.util.find_spec("mamba_ssm") is not None:
        return None
    begin: ContextVar[torch.Tensor | None] = ContextVar("begin")  # for the layer that this thread runs

    def scan(*args: Any, **options: Any) -> Any:
        return selective_scan(begin.get(), *args, **options)

    going_on = calling(whole, {SCAN: scan})

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        memory, state = kwargs[name], None
        if memory.has_previous_state(self.layer_idx):
            state = memory.layers[self.layer_idx].recurrent_states[0]
        before = begin.set(state)
        try:
            return going_on(self, hidden_states, **kwargs)
        finally:
            begin.reset(before)

    return forward


def selective_scan(
    state: torch.Tensor | None,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba's selective scan (arXiv 2312.00752, section 3), starting from `state` [batch, I, N] or zero.

    `hidden_states`, `dt` and the gate `z` [batch, I, T], `A` [I, N], `B` and `C` [batch, N, T], `D` and
    `delta_bias` [I] -> [batch, I, T]; with `return_last_state` also the state after the last token, in fp32.

        state_t = exp(dt_t A) state_(t - 1) + dt_t B_t x_t        y_t = C_t state_t + D x_t
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    steps = dt.float().permute(2, 0, 1)[..., None]
    decays = (steps * A).exp_()
    states = steps * B.float().permute(2, 0, 1)[:, :, None]  # [T, batch, I, N], like the decays
    states *= hidden_states.float().permute(2, 0, 1)[..., None]
    last = torch.zeros_like(states[0]) if state is None else state.float()
    for decay, now in zip(decays, states, strict=True):
        torch.addcmul(now, decay, last, out=now)
        last = now
    last = last.clone()
    del decays
    output = (states.to(C.dtype) @ C.permute(2, 0, 1)[..., None]).squeeze(-1).permute(1, 2, 0)
    if D is not None:
        output = output + hidden_states * D[None, :, None]
    if z is not None:
        output = output * nn.functional.silu(z)
    return (output, last) if return_last_state else output
