"""Tokens' pass through a decoder layer, up to its experts or feed-forward part, in one library call."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.mixer import angles_of, layer_with, mixer_of
from moe_local.offload.dense.norm import Kind
from moe_local.offload.dense.places import Places, States
from moe_local.offload.dense.token_block import TokenBlock
from moe_local.offload.dense.token_calls import attempt, token_calls
from moe_local.offload.dense.token_layers import TokenLayers
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import Layer, Norm, check, loaded_library
from moe_local.offload.system.threads import kernel_threads


def use_token_layers(model: Any) -> None:
    """Let the library run, in one call, the decoder layers of `model` whose attention and norms it computes.

    This holds for the same calls as for their attention, with the same bits, but for the last of what a
    shared expert's gate gives. Such a layer has an attention,
    two norms, a feed-forward part and nothing else; a trial finds out whether it combines them as the library
    does. Runs a forward of one token, for which experts must return something.
    """
    found = [(module, layer) for module in model.modules() if (layer := TokenLayer.of(module)) is not None]
    calls = token_calls(model, [module for module, _ in found]) if found else {}
    for module, layer in found:
        call = calls.get(module)
        if call is not None and len(call.args) == 1 and layer.agrees(module, *call.args, call.kwargs):
            rest = getattr(module, layer.feed_forward)
            block = TokenBlock.of(rest)
            layer.block = block if block is not None and block.agrees(rest, *call.args) else None
            cls: Any = type(module)
            module._token_layer = layer
            module.__class__ = _direct(cls)
    TokenLayers.join(model, calls)


class TokenLayer:
    """The library's call for one decoder layer: its norms, and what mixes its tokens, see mixer_of.

    Holds the addresses of the norms' weights, which are checked before each call.
    """

    def __init__(self, attention: str, norms: tuple[str, str], feed_forward: str) -> None:
        """Names of the layer's parts; `attention` may be linear attention, and the norm before it comes
        first."""
        self.attention, self.norms, self.feed_forward = attention, norms, feed_forward
        self.block: TokenBlock | None = None
        """The feed-forward part, if it is a router and experts, perhaps with a shared one."""
        self.among: tuple[weakref.ref[TokenLayers], int] | None = None
        """The layers that it can be computed with, and its number among them."""
        self._struct = Layer()
        self._made_of: tuple[Any, ...] | None = None
        """The attention's struct and the dtype of inputs that `_struct` was made for."""
        self._guard: Guard | None = None

    @classmethod
    def of(cls, module: nn.Module) -> TokenLayer | None:
        """The layer of a module that has these parts; None for others. How the module combines them is not
        checked here."""
        kinds: dict[str, list[str]] = {"attention": [], "norm": [], "other": []}
        for name, part in module.named_children():
            is_norm = isinstance(getattr(part, "_norm_kind", None), Kind)
            kind = "norm" if is_norm else "attention" if mixer_of(part) is not None else "other"
            kinds[kind].append(name)
        if [len(names) for names in kinds.values()] != [1, 2, 1]:
            return None
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(False)):
            return None
        first, second = kinds["norm"]
        return cls(kinds["attention"][0], (first, second), kinds["other"][0])

    def agrees(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the layer, called with x and `kwargs`, combines its parts as the library does; compared bit
        by bit, with random outputs of the parts."""
        generator = torch.Generator().manual_seed(13)
        x, attended, fed = (torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(3))
        given: dict[str, Any] = {}

        def answering(name: str, answer: torch.Tensor) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                given[name] = args[0] if args else kwargs.get("hidden_states")
                return (answer, *output[1:]) if isinstance(output, tuple) else answer

            return getattr(module, name).register_forward_hook(hook, with_kwargs=True).remove

        with contextlib.ExitStack() as hooks, torch.no_grad():
            hooks.callback(answering(self.attention, attended))
            hooks.callback(answering(self.feed_forward, fed))
            output = attempt(module, x, **kwargs)
            if output is None:
                return False
            first, second = (getattr(module, name) for name in self.norms)
            wanted = [first(x), second(x + attended), x + attended + fed]
        got = [given.get(self.attention), given.get(self.feed_forward), output]
        return all(
            torch.is_tensor(a) and a.dtype is b.dtype and torch.equal(a, b)
            for a, b in zip(got, wanted, strict=True)
        )

    @property
    def struct(self) -> Layer:
        """The library's description of the layer. Valid after `places`; a new one if weights have moved."""
        return self._struct

    def places(self, module: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Places | States | None:
        """Where the keys and values of x [n, 1, D], a token of each of n sequences, go, or what states they
        overwrite; None if the library cannot serve this call.

        Updates the addresses of the layer's weights.
        """
        attention = module._modules[self.attention]
        mixer = mixer_of(attention)
        if mixer is None:
            return None
        places = mixer.places(attention, x, kwargs)
        return places if places is not None and self.ready(module, x) else None

    def ready(self, module: Any, x: torch.Tensor) -> bool:
        """Update the addresses of the layer's weights, after its attention's, for inputs like x [..., D].

        False if the library cannot read them, or if hooks or the like depend on the calls of the parts."""
        attention = module._modules[self.attention]
        mixer = mixer_of(attention)
        if mixer is None:
            return False
        if self._guard is not None and self._made_of == (mixer.struct, x.dtype) and self._guard.holds():
            return True
        norms = [module._modules[name] for name in self.norms]
        guard = Guard(module, [attention, *norms], shown=norms[1])
        if not guard.holds() or not all(_is_readable(norm, x) for norm in norms):
            return False
        self._struct = layer_with(mixer, *map(_struct_of, norms))
        self._made_of, self._guard = (mixer.struct, x.dtype), guard
        return True

    def __call__(
        self, module: Any, x: torch.Tensor, kwargs: dict[str, Any], places: Places | States
    ) -> torch.Tensor:
        """x [n, 1, D] -> the layer's output [n, 1, D]. `places` are from `places()`, and written to.

        Onlookers of the second norm are shown the input that it would be given, before the experts run."""
        parts = module._modules
        rest = parts[self.feed_forward]
        described = None if self.block is None else self.block.describe(rest, x.dtype)
        router = None if described is None else described.router
        mixer = mixer_of(parts[self.attention])
        assert mixer is not None
        cos, sin = angles_of(mixer, kwargs, places.tokens)
        tokens, stream = places.tokens, torch.empty_like(x)
        if isinstance(places, States):
            places.note_change()
        # Allocated in the shape that the next part takes: a view in another shape costs as much time.
        inner = torch.empty_like(x) if router is None else torch.empty(tokens, x.shape[-1], dtype=x.dtype)
        weights = None if router is None else torch.empty(tokens, router.top_k, dtype=torch.float32)
        ids = None if router is None else torch.empty(tokens, router.top_k, dtype=torch.int64)
        check(
            loaded_library().moe_layer(
                ctypes.byref(self._struct),
                None if router is None else ctypes.byref(router),
                x.data_ptr(),
                None if cos is None else cos.data_ptr(),
                None if sin is None else sin.data_ptr(),
                places.sequences(),
                tokens,
                stream.data_ptr(),
                inner.data_ptr(),
                None if weights is None else weights.data_ptr(),
                None if ids is None else ids.data_ptr(),
                rounding(mixer.activations, x.dtype),
                kernel_threads(),
            )
        )
        norm = parts[self.norms[1]]
        for onlooker in norm._forward_pre_hooks.values():
            onlooker(norm, (stream,))
        answer: Any
        if described is None or self.block is None:
            answer = rest(inner)
            answer = answer[0] if isinstance(answer, tuple) else answer
        else:
            answer = described.add_shared(inner, rest._modules[self.block.experts](inner, ids, weights))
            if tokens > 1:
                answer = answer.view(x.shape)
        output: torch.Tensor = stream + answer  # [n, 1, D] both; or, for one token, [1, 1, D] and [1, D]
        return output

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy, and without the other layers."""
        return {**self.__dict__, "_struct": None, "_made_of": None, "_guard": None, "among": None}


def _is_readable(norm: Any, x: torch.Tensor) -> bool:
    """Whether the module `norm` is a recognized norm whose weight the library can read, for x [..., D]."""
    if not isinstance(getattr(norm, "_norm_kind", None), Kind):
        return False
    weight = norm.weight
    fits = weight.dtype is x.dtype and weight.shape == x.shape[-1:]
    return bool(fits and weight.is_cpu and weight.is_contiguous())


def _struct_of(norm: Any) -> Norm:
    return Norm(norm.weight.data_ptr(), norm._norm_kind.epsilon, norm._norm_kind.shifted)


@cache
def _direct(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: TokenLayer = self._token_layer
        if layer.among is not None and not args:
            reference, number = layer.among
            together = reference()
            output = None if together is None else together.output(number, hidden_states, kwargs)
            if output is not None:
                return output
        places = None if args else layer.places(self, hidden_states, kwargs)
        if places is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return layer(self, hidden_states, kwargs, places)

    return stand_in(cls, _direct, forward)
