"""moe_layer and moe_layers with latent attention and Gated DeltaNet, against the calls that they are made
of."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from moe_local.offload.native.library import (
    BAD_ARGUMENT,
    DTYPES,
    FLOATS,
    INT16,
    Gate,
    Norm,
    Sequence,
    WholeLayer,
)
from support import delta_net_calls, latent_calls, packed
from support.attention_calls import KINDS, OUTSIDE, SPANS, LayerCall

HIDDEN = 192


class Latent:
    """Latent attention of several tokens, of sequences that begin and end at different positions."""

    def __init__(self, dtype: torch.dtype, tokens: int, seed: int = 0) -> None:
        case = latent_calls.Case(format="nf4", dtype=dtype, hidden=HIDDEN)
        self._together = latent_calls.Together(case, SPANS[:tokens], seed)
        self.call, self.x = self._together.calls[0], self._together.x
        self.sequences = list(self._together.sequences)
        self.cos, self.sin = self._together.cos, self._together.sin

    def __call__(self, lib: Any, x: torch.Tensor, activations: int) -> torch.Tensor:
        return self._together.answer(lib, x=x.data_ptr(), activations=activations)

    def forget(self) -> list[torch.Tensor]:
        """What has been written to the sequences, which is put back."""
        return self._together.forget()


class Net:
    """A Gated DeltaNet of several tokens."""

    def __init__(self, dtype: torch.dtype, tokens: int, seed: int = 0) -> None:
        case = delta_net_calls.Case(format="nf4", dtype=dtype, hidden=HIDDEN, rows=tokens)
        self.call = delta_net_calls.Call(case, seed)
        self.x = self.call.x
        self.kept = self.call.inputs.clone(), self.call.states.clone()
        addresses = self.call.inputs.data_ptr(), self.call.states.data_ptr()
        self.sequences = [Sequence(*addresses, 0, 0, 0)] + [Sequence()] * (tokens - 1)  # only one is read
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None

    def __call__(self, lib: Any, x: torch.Tensor, activations: int) -> torch.Tensor:
        return self.call.answer(lib, x=x.data_ptr(), activations=activations)

    def forget(self) -> list[torch.Tensor]:
        """The inputs and states, which are put back."""
        call = self.call
        written = [call.inputs.clone(), call.states.clone()]
        call.inputs.copy_(self.kept[0])
        call.states.copy_(self.kept[1])
        return written


class Parts(NamedTuple):
    """What moe_layer gives."""

    y: torch.Tensor
    inner: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


class OneLayer:
    """A call of moe_layer for several tokens, and the same by one call after the other."""

    def __init__(self, mixer: Latent | Net, shifted: bool = False) -> None:
        self.mixer, self.x, self.tokens = mixer, mixer.x, len(mixer.x)
        self.dtype = mixer.x.dtype
        self.call = LayerCall(mixer.call, shifted, self.dtype, True)
        self.memory = [
            torch.full((self.tokens * width + 32,), 77, dtype=dtype)
            for width, dtype in (
                (HIDDEN, self.dtype),
                (HIDDEN, self.dtype),
                (2, torch.float32),
                (2, torch.int64),
            )
        ]
        self.sequences = (Sequence * self.tokens)(*mixer.sequences)
        outputs = (memory[16:].data_ptr() for memory in self.memory)
        self.places: dict[str, Any] = {
            "x": self.x.data_ptr(),
            "cos": None if mixer.cos is None else mixer.cos.data_ptr(),
            "sin": None if mixer.sin is None else mixer.sin.data_ptr(),
            "sequences": self.sequences,
            "tokens": self.tokens,
            **dict(zip(Parts._fields, outputs, strict=True)),
        }

    def __call__(self, lib: Any, **changed: Any) -> int:
        return self.call(lib, **self.places | changed)

    def answer(self, lib: Any, **changed: Any) -> Parts:
        """Once nothing has been written beside it."""
        for memory in self.memory:
            memory.fill_(77)
        assert self(lib, **changed) == 0
        for memory in self.memory:
            assert (memory[:16] == 77).all()
            assert (memory[-16:] == 77).all()
        return Parts(*(memory[16:-16].view(self.tokens, -1).clone() for memory in self.memory))

    def parts(self, lib: Any, activations: int = FLOATS) -> Parts:
        """By moe_norm, moe_latent_attention or moe_delta_net, a sum of torch's, and moe_route."""
        dtype, layer, chooser = DTYPES[self.dtype], self.call.layer, self.call.chooser

        def norm(x: torch.Tensor, of: Norm) -> torch.Tensor:
            out = torch.empty_like(x)
            sizes = self.tokens, HIDDEN, dtype
            weight = of.weight, of.shifted, of.epsilon
            assert lib.moe_norm(x.data_ptr(), *weight, *sizes, out.data_ptr(), 1) == 0
            return out

        y = self.x + self.mixer(lib, norm(self.x, layer.before_attention), activations)
        inner = norm(y, layer.before_feed_forward)
        weights, ids = torch.empty(self.tokens, 2), torch.empty(self.tokens, 2, dtype=torch.int64)
        outputs = None, weights.data_ptr(), ids.data_ptr()
        matrix = ctypes.byref(chooser)
        assert lib.moe_route(matrix, inner.data_ptr(), self.tokens, dtype, *outputs, 1) == 0
        return Parts(y, inner, weights, ids)


def same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Latent, Net])
def test_a_layer_is_its_parts_one_after_the_other(
    lib: Any, isa: str, kind: type[Latent | Net], dtype: torch.dtype, tokens: int
) -> None:
    for shifted, activations in ((False, FLOATS), (True, INT16)):
        layer = OneLayer(kind(dtype, tokens), shifted)
        want = layer.parts(lib, activations)
        written = layer.mixer.forget()
        assert all(x.isfinite().all() for x in [*want, *written])
        for threads in (1, 3):
            got = layer.answer(lib, activations=activations, threads=threads)
            assert same_bits(list(got), list(want))
            assert same_bits(layer.mixer.forget(), written)


@pytest.mark.parametrize("kind", [Latent, Net])
def test_a_layer_without_a_router_chooses_none(lib: Any, kind: type[Latent | Net]) -> None:
    layer = OneLayer(kind(torch.bfloat16, 3))
    want = layer.parts(lib)
    layer.mixer.forget()
    got = layer.answer(lib, routed=False, weights=None, ids=None)
    assert same_bits([got.y, got.inner], [want.y, want.inner])
    assert (got.ids == 77).all()
    assert (got.weights == 77).all()


def other_kinds(layer: OneLayer) -> list[str]:
    return [name for name in KINDS.values() if not getattr(layer.call.layer, name)]


@pytest.mark.parametrize("kind", [Latent, Net])
def test_a_layer_has_one_kind_of_attention(lib: Any, kind: type[Latent | Net]) -> None:
    for place in range(2):
        layer = OneLayer(kind(torch.float32, 1))
        assert layer(lib) == 0
        layer.mixer.forget()
        name = other_kinds(layer)[place]
        type_of = next(struct for struct, field in KINDS.items() if field == name)
        setattr(layer.call.layer, name, ctypes.pointer(type_of()))
        assert layer(lib) == BAD_ARGUMENT
        setattr(layer.call.layer, name, None)
        assert layer(lib) == 0
    for name in KINDS.values():
        setattr(layer.call.layer, name, None)
    assert layer(lib) == BAD_ARGUMENT


WRONG: dict[str, Callable[[OneLayer], dict[str, Any] | None]] = {
    **{f"no {name}": lambda _, name=name: {name: None} for name in ("layer", "x", "y", "inner", "sequences")},
    **{f"no {name} to write": lambda _, name=name: {name: None} for name in ("weights", "ids")},
    "no tokens": lambda _: {"tokens": 0},
    "too many tokens": lambda _: {"tokens": 257},
    "no threads": lambda _: {"threads": 0},
    "activations that are none": lambda _: {"activations": 4},
    "a norm without weight": lambda layer: setattr(layer.call.layer.before_attention, "weight", None),
    "another without": lambda layer: setattr(layer.call.layer.before_feed_forward, "weight", None),
    "a dtype above": lambda layer: setattr(layer.mixer.call.struct, "dtype", 3),
    "a dtype below": lambda layer: setattr(layer.mixer.call.struct, "dtype", -1),
    "other outputs": lambda layer: setattr(layer.mixer.call.struct.o, "rows", 64),
    "a sequence without memory": lambda layer: setattr(layer.sequences[0], "keys", None),
    "a sequence without more": lambda layer: setattr(layer.sequences[0], "values", None),
    "a router without matrix": lambda layer: setattr(layer.call.chooser, "matrix", None),
    "a router of another width": lambda layer: setattr(layer.call.matrix, "cols", 32),
    "a router without rows": lambda layer: setattr(layer.call.matrix, "rows", 0),
    "more experts than there are": lambda layer: setattr(layer.call.chooser, "top_k", 9),
    "weights of no dtype": lambda layer: setattr(layer.call.chooser, "dtype", 3),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", [Latent, Net])
def test_wrong_layers_are_refused(lib: Any, kind: type[Latent | Net], wrong: str) -> None:
    layer = OneLayer(kind(torch.float32, 2))
    assert layer(lib) == 0
    assert layer(lib, **(WRONG[wrong](layer) or {})) == BAD_ARGUMENT


def test_columns_that_are_none_are_refused(lib: Any) -> None:
    for kind, name in ((Latent, "kv_a"), (Net, "qkv")):
        for cols in (0, -64, 2**40, 2**62):
            layer = OneLayer(kind(torch.float32, 1))
            getattr(layer.mixer.call.struct, name).cols = cols
            assert layer(lib) == BAD_ARGUMENT
            assert all((memory == 77).all() for memory in layer.memory)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_both_kinds_are_one_after_the_other(
    lib: Any, isa: str, dtype: torch.dtype, tokens: int
) -> None:
    latent = Latent(dtype, tokens, 1)
    mixers: list[Latent | Net] = [Net(dtype, tokens), latent, Net(dtype, tokens, 2)]
    layers, gate = [OneLayer(mixer) for mixer in mixers], Gate(1, 3, 0, 0)
    experts = [packed.pack_expert("nf4", HIDDEN, 64, gate, seed=e) for e in range(8)]
    table = (ctypes.c_void_p * 8)(*(ctypes.addressof(expert.struct) for expert in experts))
    x, want, choices = layers[0].x.clone(), [], []
    for layer in layers:
        layer.x.copy_(x)
        found = layer.answer(lib)
        answer, counts = torch.empty_like(x), torch.zeros(8, dtype=torch.int64)
        arguments = table, 8, found.ids.data_ptr(), found.weights.data_ptr(), 2, ctypes.byref(gate)
        arguments += found.inner.data_ptr(), tokens, counts.data_ptr(), answer.data_ptr()
        assert lib.moe_chosen_experts(*arguments, DTYPES[dtype], FLOATS, 1) == 0
        x = found.y + answer
        want.append(x)
        choices.append(found.ids.flatten())
    written = [mixer.forget() for mixer in mixers]
    chosen = torch.zeros(3, 8, dtype=torch.int64)
    whole = (WholeLayer * 3)(
        *(
            WholeLayer(
                ctypes.pointer(layer.call.layer),
                ctypes.pointer(layer.call.chooser),
                ctypes.cast(table, ctypes.c_void_p),
                8,
                ctypes.pointer(gate),
                counts.data_ptr(),
            )
            for layer, counts in zip(layers, chosen, strict=True)
        )
    )
    sequences = (Sequence * (3 * tokens))(*(s for mixer in mixers for s in mixer.sequences))
    y, ids = torch.full((3, tokens, HIDDEN), OUTSIDE, dtype=dtype), torch.full((6 * tokens,), -7)
    nets = [mixer for mixer in mixers if isinstance(mixer, Net)]
    left = [torch.empty(tokens * net.call.left()) for net in nets]
    for threads, later in ((1, False), (3, False), (1, True), (3, True)):
        angles = latent.cos.data_ptr(), latent.sin.data_ptr()
        changes = torch.cat(left)
        places = sequences, tokens, y.data_ptr(), ids.data_ptr(), changes.data_ptr() if later else None
        assert lib.moe_layers(whole, 3, layers[0].x.data_ptr(), *angles, *places, threads) == 0
        assert torch.equal(y, torch.stack(want))
        assert torch.equal(ids, torch.cat(choices))
        if later:
            for net, mine in zip(nets, changes.split([len(part) for part in left]), strict=True):
                assert same_bits(net.forget(), list(net.kept))
                assert net.call.change(lib, mine, threads=threads) == 0
        for mixer, before in zip(mixers, written, strict=True):
            assert same_bits(mixer.forget(), before)
        y.fill_(OUTSIDE)
    assert chosen.sum(1).tolist() == [8 * tokens] * 3
