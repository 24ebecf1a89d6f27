"""moe_layer against the calls that it is made of, and moe_layers against moe_layer and moe_chosen_experts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_local.offload.native.library import (
    BAD_ARGUMENT,
    DTYPES,
    FLOATS,
    INT8,
    DeltaNet,
    Gate,
    LatentAttention,
    Sequence,
    WholeLayer,
)
from support import mlp_calls, packed
from support.attention_calls import OUTSIDE, SPANS, Call, Case, LayerCall, Together


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_layer_is_its_parts_one_after_the_other(
    lib: Any, isa: str, dtype: torch.dtype, shifted: bool
) -> None:
    for router_dtype, normalized in ((dtype, True), (torch.float32, False)):
        call = Call(Case(format="nf4", dtype=dtype, norms=True, hidden=192, heads=6))
        layer = LayerCall(call, shifted, router_dtype, normalized)
        want = layer.parts(lib)
        keys, values = call.keys.clone(), call.values.clone()
        for threads in (1, 3):
            call.keys[:, call.case.last] = call.values[:, call.case.last] = OUTSIDE
            assert layer(lib, threads=threads) == 0
            got = layer.y, layer.inner, layer.weights, layer.ids
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            for mine, theirs in ((call.keys, keys), (call.values, values)):
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        layer.ids.fill_(-7)
        assert layer(lib, routed=False, weights=None, ids=None) == 0
        assert torch.equal(layer.inner, want[1])
        assert (layer.ids == -7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tokens_pass_a_layer_as_each_does_alone(lib: Any, isa: str, dtype: torch.dtype) -> None:
    case = Case(format="nf4", dtype=dtype, norms=True, hidden=192, heads=6)
    together = Together(case, SPANS[:4])
    layers = [LayerCall(call, False, dtype, True) for call in together.calls]
    assert [layer(lib) for layer in layers] == [0] * 4
    want = [
        torch.stack([getattr(layer, name) for layer in layers]) for name in ("y", "inner", "weights", "ids")
    ]
    written = together.forget()
    for threads in (1, 3):
        got = [torch.full_like(x, -7) for x in want]
        outputs = dict(zip(("y", "inner", "weights", "ids"), (x.data_ptr() for x in got), strict=True))
        places = {name: together.arguments()[name] for name in ("x", "cos", "sin", "sequences", "tokens")}
        assert layers[0](lib, **places, **outputs, threads=threads) == 0
        assert all(map(torch.equal, got, want))
        assert all(map(torch.equal, together.forget(), written))


LAYERS_WRONG: dict[str, Callable[[LayerCall], dict[str, Any] | None]] = {
    **{f"no {name}": lambda _, name=name: {name: None} for name in ("layer", "x", "y", "inner", "ids")},
    "latent attention too": lambda call: setattr(
        call.layer, "latent_attention", ctypes.pointer(LatentAttention())
    ),
    "a DeltaNet too": lambda call: setattr(call.layer, "delta_net", ctypes.pointer(DeltaNet())),
    "no attention": lambda call: setattr(call.layer, "attention", None),
    "a norm without weight": lambda call: setattr(call.layer.before_attention, "weight", None),
    "another without": lambda call: setattr(call.layer.before_feed_forward, "weight", None),
    "a router without matrix": lambda call: setattr(call.chooser, "matrix", None),
    "a router of another width": lambda call: setattr(call.matrix, "cols", 32),
    "a router without rows": lambda call: setattr(call.matrix, "rows", 0),
    "more experts than there are": lambda call: setattr(call.chooser, "top_k", 9),
    "weights of no dtype": lambda call: setattr(call.chooser, "dtype", 3),
}


@pytest.mark.parametrize("wrong", LAYERS_WRONG)
def test_wrong_layers_are_refused(lib: Any, wrong: str) -> None:
    call = LayerCall(Call(Case()), False, torch.float32, True)
    assert call(lib) == 0
    assert call(lib, **(LAYERS_WRONG[wrong](call) or {})) == BAD_ARGUMENT


class Pass:
    """A call of moe_layers for tokens of Together's first layer and of others like it, and the same by one
    call after the other. Experts are 8, of which the first layer chooses 2 and the others 3. `shared`: there
    are shared experts, `share`: and they have gates."""

    def __init__(
        self, dtype: torch.dtype, tokens: int, layers: int = 3, *, shared: bool = False, share: bool = False
    ) -> None:
        case = Case(format="nf4", dtype=dtype, norms=True, hidden=192, heads=6)
        self.tokens, self.dtype = tokens, dtype
        self.rows = [Together(case, SPANS[:tokens], seed=layer) for layer in range(layers)]
        self.calls = [LayerCall(rows.calls[0], False, dtype, True) for rows in self.rows]
        for call in self.calls[1:]:
            call.chooser.top_k = 3
        self.gate = Gate(1, 3, 0, 0)
        of_shared = mlp_calls.Case(192, 80, tokens, share=share, format="int8", dtype=dtype)
        self.shared = [mlp_calls.Call(of_shared, seed) for seed in range(layers if shared else 0)]
        self.experts = [
            [packed.pack_expert("nf4", 192, 64, self.gate, seed=8 * layer + e) for e in range(8)]
            for layer in range(layers)
        ]
        self.tables = [
            (ctypes.c_void_p * 8)(*(ctypes.addressof(expert.struct) for expert in experts))
            for experts in self.experts
        ]
        self.chosen = torch.zeros(layers, 8, dtype=torch.int64)
        self.ids = torch.full((tokens * sum(call.chooser.top_k for call in self.calls),), -7)
        self.y = torch.full((layers, tokens, 192), OUTSIDE, dtype=dtype)
        self.structs = (WholeLayer * layers)(*map(self._struct, range(layers)))
        sequences = [sequence for rows in self.rows for sequence in rows.sequences]
        first = self.rows[0].arguments()
        self.arguments: dict[str, Any] = {
            "layers": self.structs,
            "count": layers,
            "x": first["x"],
            "cos": first["cos"],
            "sin": first["sin"],
            "sequences": (Sequence * len(sequences))(*sequences),
            "tokens": tokens,
            "y": self.y.data_ptr(),
            "ids": self.ids.data_ptr(),
            "changes": None,
            "threads": 1,
        }

    def _struct(self, layer: int) -> WholeLayer:
        call, chosen = self.calls[layer], self.chosen[layer].data_ptr()
        table = ctypes.cast(self.tables[layer], ctypes.c_void_p)
        parts = ctypes.pointer(call.layer), ctypes.pointer(call.chooser), table, 8, ctypes.pointer(self.gate)
        whole = WholeLayer(*parts, chosen, FLOATS, FLOATS, FLOATS)
        if self.shared:
            shared = self.shared[layer]
            # Other activations than the experts', so that a mistake between them shows.
            whole.of_shared, whole.shared = INT8, ctypes.pointer(shared.struct)
            whole.share = ctypes.pointer(shared.share) if shared.case.share else None
        return whole

    def __call__(self, lib: Any, **changed: Any) -> int:
        status: int = lib.moe_layers(*(self.arguments | changed).values())
        return status

    def one_by_one(self, lib: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """y [L, T, D], and the experts that were chosen, layer by layer."""
        x, outputs, choices = self.rows[0].x, [], []
        first = self.rows[0].arguments()
        for layer, (rows, call, table) in enumerate(zip(self.rows, self.calls, self.tables, strict=True)):
            top_k, tokens = call.chooser.top_k, self.tokens
            stream, inner, answer = (torch.empty(tokens, 192, dtype=self.dtype) for _ in range(3))
            weights, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
            places = {"x": x.data_ptr(), "cos": first["cos"], "sin": first["sin"], "tokens": tokens}
            outs = {"y": stream, "inner": inner, "weights": weights, "ids": ids}
            places |= {"sequences": rows.arguments()["sequences"]}
            assert call(lib, **places, **{name: out.data_ptr() for name, out in outs.items()}) == 0
            chosen = torch.zeros(8, dtype=torch.int64)
            arguments = (table, 8, ids.data_ptr(), weights.data_ptr(), top_k, ctypes.byref(self.gate))
            arguments += (inner.data_ptr(), tokens, chosen.data_ptr(), answer.data_ptr())
            assert lib.moe_chosen_experts(*arguments, DTYPES[self.dtype], FLOATS, 1) == 0
            if self.shared:
                answer += self.shared[layer].answer(lib, x=inner.data_ptr(), activations=INT8)
            x = stream + answer
            outputs.append(x)
            choices.append(ids.flatten())
        return torch.stack(outputs), torch.cat(choices)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "share"), [(False, False), (True, False), (True, True)])
def test_several_layers_are_one_after_the_other(
    lib: Any, isa: str, shared: bool, share: bool, dtype: torch.dtype, tokens: int
) -> None:
    whole = Pass(dtype, tokens, shared=shared, share=share)
    want, ids = whole.one_by_one(lib)
    written = [rows.forget() for rows in whole.rows]
    for threads in (1, 3):
        whole.y.fill_(OUTSIDE)
        whole.chosen.zero_()
        assert whole(lib, threads=threads) == 0
        assert torch.equal(whole.y, want)
        assert torch.equal(whole.ids, ids)
        assert whole.chosen.sum(1).tolist() == [2 * tokens, 3 * tokens, 3 * tokens]
        for rows, before in zip(whole.rows, written, strict=True):
            assert all(map(torch.equal, rows.forget(), before))


def test_a_layer_that_fails_leaves_those_before_it(lib: Any) -> None:
    whole = Pass(torch.float32, 1)
    want, _ = whole.one_by_one(lib)
    assert whole(lib) == 0
    counts = whole.chosen.clone()
    whole.y.fill_(OUTSIDE)
    whole.calls[1].layer.before_feed_forward.weight = None
    assert whole(lib) == BAD_ARGUMENT
    assert torch.equal(whole.y[0], want[0])
    assert (whole.y[1:] == OUTSIDE).all()
    assert torch.equal(whole.chosen, counts)


def test_a_shared_expert_counts(lib: Any) -> None:
    """Whether there is one, whether it has a gate, and with which activations."""
    answers = []
    for spoil in (None, "shared", "share", "of_shared"):
        whole = Pass(torch.float32, 1, shared=True, share=True)
        if spoil:
            setattr(whole.structs[1], spoil, 0 if spoil == "of_shared" else None)
        assert whole(lib) == 0
        answers.append(whole.y.clone())
    for place, answer in enumerate(answers[1:]):
        assert torch.equal(answer[0], answers[0][0])
        assert not any(torch.equal(answer[1], other[1]) for other in answers[: place + 1])


def test_a_shared_expert_that_fails_leaves_the_counts(lib: Any) -> None:
    whole = Pass(torch.float32, 4, shared=True)
    whole.shared[2].struct.down.rows = 64
    assert whole(lib) == BAD_ARGUMENT
    assert not whole.chosen.any()


def test_experts_that_fail_leave_the_counts(lib: Any) -> None:
    whole = Pass(torch.float32, 4)
    for expert in whole.experts[2]:
        expert.struct.down.rows = 64
    assert whole(lib) == BAD_ARGUMENT
    assert not whole.chosen.any()


WHOLE_WRONG: dict[str, Callable[[Pass], Any]] = {
    **{
        f"no {name}": lambda _, name=name: {name: None}
        for name in ("layers", "x", "cos", "sequences", "y", "ids")
    },
    **{
        f"a layer without {name}": lambda whole, name=name: setattr(whole.structs[2], name, None)
        for name in ("layer", "router", "experts", "gate", "chosen")
    },
    "no layers at all": lambda _: {"count": 0},
    "no tokens": lambda _: {"tokens": 0},
    "too many tokens": lambda _: {"tokens": 257},
    "no threads": lambda _: {"threads": 0},
    "no experts": lambda whole: setattr(whole.structs[2], "count", 0),
    "fewer experts than are chosen": lambda whole: setattr(whole.structs[2], "count", 2),
    "a table without experts": lambda whole: whole.tables[1].__setitem__(0, None),
    "experts of another width": lambda whole: setattr(whole.experts[1][0].struct.up, "cols", 128),
    "none chosen": lambda whole: setattr(whole.calls[1].chooser, "top_k", 0),
    "layers of two dtypes": lambda whole: setattr(whole.rows[1].calls[0].struct, "dtype", 1),
    "a dtype that is none": lambda whole: setattr(whole.rows[0].calls[0].struct, "dtype", 3),
    "activations that are none": lambda whole: setattr(whole.structs[0], "activations", 4),
    "the experts' that are none": lambda whole: setattr(whole.structs[0], "of_experts", -1),
}


@pytest.mark.parametrize("wrong", WHOLE_WRONG)
def test_wrong_whole_layers_are_refused(lib: Any, wrong: str) -> None:
    whole = Pass(torch.float32, 1)
    assert whole(lib) == 0
    assert whole(lib, **(WHOLE_WRONG[wrong](whole) or {})) == BAD_ARGUMENT


SHARED_WRONG: dict[str, Callable[[Pass], Any]] = {
    "another width": lambda whole: setattr(whole.shared[2].struct.gate, "cols", 128),
    "another dtype": lambda whole: setattr(whole.shared[2].struct, "dtype", 1),
    "a dtype that is none": lambda whole: setattr(whole.shared[2].struct, "dtype", 3),
}
"""What is seen before anything is computed."""

SHARED_WRONG_IN_MLP: dict[str, Callable[[Pass], Any]] = {
    "other outputs": lambda whole: setattr(whole.shared[2].struct.down, "rows", 128),
    "a function that is clamped": lambda whole: setattr(whole.shared[2].struct, "function", 6),
    "a share of another width": lambda whole: setattr(whole.shared[2].share, "cols", 128),
    "activations that are none": lambda whole: setattr(whole.structs[2], "of_shared", 4),
}


@pytest.mark.parametrize("wrong", [*SHARED_WRONG, *SHARED_WRONG_IN_MLP])
def test_wrong_shared_experts_are_refused(lib: Any, wrong: str) -> None:
    whole = Pass(torch.float32, 1, shared=True, share=True)
    assert whole(lib) == 0
    whole.y.fill_(OUTSIDE)
    (SHARED_WRONG | SHARED_WRONG_IN_MLP)[wrong](whole)
    assert whole(lib) == BAD_ARGUMENT
    assert (whole.y[2 if wrong in SHARED_WRONG_IN_MLP else 0 :] == OUTSIDE).all()
