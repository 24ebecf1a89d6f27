"""What the library's calls have in common for one token of each of a few sequences in a layer with a state,
which they overwrite."""

from __future__ import annotations

import functools
from abc import abstractmethod
from functools import cache
from typing import Any

import torch

from moe_local.offload.dense.library_call import LibraryCall
from moe_local.offload.dense.places import States, cache_of
from moe_local.offload.dense.token_calls import agrees_on_sizes, all_close, attempt, token_calls
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import library


class TokenStateCall(LibraryCall):
    """The library's call for one layer, whose states it overwrites."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, places: States) -> torch.Tensor:
        """x [n, 1, D] and places that it `takes` -> [n, 1, D]. To be called only after `ready`."""

    @property
    @abstractmethod
    def inputs_shape(self) -> tuple[int, int]:
        """[channels, taps], the sizes of a sequence's inputs of the convolution."""

    @property
    @abstractmethod
    def states_shape(self) -> tuple[int, int, int]:
        """The sizes of a sequence's state."""

    def takes(self, x: torch.Tensor, inputs: Any, states: Any) -> bool:
        """Whether these have the dtypes, sizes and memory layout that the library reads."""
        if not torch.is_tensor(inputs) or not torch.is_tensor(states):
            return False
        rows = len(x)
        return (
            rows > 0
            and inputs.dtype is x.dtype
            and x.shape == (rows, 1, self._hidden)
            and inputs.shape == (rows, *self.inputs_shape)
            and states.dtype is torch.float32
            and states.shape == (rows, *self.states_shape)
            and x.is_contiguous()
            and inputs.is_contiguous()
            and states.is_contiguous()
            and inputs.is_cpu
            and states.is_cpu
        )

    def places(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> States | None:
        """The states that x [n, 1, D] overwrites if the library can serve this call of the module, for which
        it is `ready` then; else None."""
        if x.dim() != 3 or x.shape[1] != 1 or len(x) > self.most_tokens or not x.is_cpu:
            return None
        if module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        places = states_of(kwargs, module.layer_idx) if overwrites_states(kwargs) else None
        if places is None or not self.takes(x, *places) or not self.ready(module, x.dtype):
            return None
        return places


def use_state_calls(model: Any, kind: type[TokenStateCall]) -> None:
    """Let the library compute, for one token of each of a few sequences, those layers of `model`, in CPU
    memory, for which there is a call of this kind that gives the same in trials.

    Runs a forward of one token, for which experts must return something.
    """
    if library() is None or model.device.type != "cpu":
        return
    found = [module for module in model.modules() if any(hasattr(module, name) for name in kind.FIRST)]
    for called, (args, others, *_) in (token_calls(model, found) if found else {}).items():
        module: Any = called
        arguments = others | dict(zip(("hidden_states",), args, strict=False))
        if len(args) > 1 or "hidden_states" not in arguments:
            continue
        calls = kind.of(module, arguments["hidden_states"].dtype)
        if calls is not None and _agrees(module, calls, arguments):
            module._token_state_call = calls
            cls: Any = type(module)
            module.__class__ = _direct(cls)


def _agrees(module: Any, calls: TokenStateCall, arguments: dict[str, Any]) -> bool:
    """Whether the library's call and the module give the same."""
    generator = torch.Generator().manual_seed(19)
    return agrees_on_sizes(lambda size: _agrees_at(module, calls, arguments, size, generator))


@torch.no_grad()
def _agrees_at(
    module: Any, calls: TokenStateCall, arguments: dict[str, Any], size: float, generator: torch.Generator
) -> bool:
    shape, dtype = arguments["hidden_states"].shape, arguments["hidden_states"].dtype
    x = size * torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    states = states_of(arguments, module.layer_idx)
    if states is None or not calls.takes(x, *states) or not calls.ready(module, dtype):
        return False
    for state in states:
        state.copy_(torch.randn(state.shape, generator=generator, dtype=torch.float32))
    mine = [state.clone() for state in states]
    wanted = attempt(module, **arguments | {"hidden_states": x, "attention_mask": None})
    if wanted is None:
        return False
    got = calls(x, States(*mine))
    pairs = [(got, wanted), *zip(mine, states, strict=True)]
    return all_close(pairs, calls.activations)


def overwrites_states(kwargs: dict[str, Any]) -> bool:
    """Whether a call of a layer for single tokens, with these arguments, makes each a part of its sequence's
    state."""
    return kwargs.get("attention_mask") is None and kwargs.get("cu_seq_lens_q") is None


def states_of(kwargs: dict[str, Any], index: int) -> States | None:
    """A layer's states of earlier tokens in the cache that it is called with, which the call would overwrite;
    None if there are none, or if they are to be kept."""
    layers = getattr(cache_of(kwargs), "layers", ())
    layer: Any = layers[index] if index < len(layers) else None
    if getattr(layer, "record_past", True) or not layer.has_previous_state[0]:
        return None
    return States(layer.conv_states[0], layer.recurrent_states[0])


@cache
def _direct(cls: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls: TokenStateCall = self._token_state_call
        places = None if args else calls.places(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return calls(hidden_states, places)

    return stand_in(cls, _direct, forward)
