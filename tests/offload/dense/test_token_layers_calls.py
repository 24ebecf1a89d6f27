"""Decoder layers that the library computes together: callers and hooks that do what a model's forward does
not, and what ends a pass for one call and not for the next."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import moe_local
from moe_local.offload.dense import token_layers
from moe_local.offload.dense.token_layers import TokenLayers
from moe_local.offload.native.library import check, library
from support.decoder_layers import IDS, Loop, apart, counted, layers_of, one_by_one, together

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

LAYERS = 4


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules could be computed together, each time that this was found out."""
    made: list[int] = []
    take = TokenLayers._take

    def noting(self: TokenLayers, *args: Any) -> None:
        take(self, *args)
        made.append(len(self._parts))

    monkeypatch.setattr(TokenLayers, "_take", noting)
    return made


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """A model of four layers, all experts in RAM."""

    def load(family: str = "mixtral", config: dict[str, Any] | None = None, **more: Any) -> Any:
        folder = make_checkpoint(family, **(config or {"num_hidden_layers": LAYERS}))
        return moe_local.load(folder, device="cpu", experts="nf4", dense="fp32", context=64, **more)

    return load


def both(
    load: Callable[..., Any], use: Callable[[Any], torch.Tensor], ends: bool = False
) -> list[tuple[torch.Tensor, Any]]:
    """What `use` returns and the counts, for a model and for another whose layers are computed one by one.
    `ends`: with whole forwards of the model, of which the first settles what was counted ahead."""
    found = []
    for alone in (False, True):
        with load() as model:
            output = use(apart(model.hf) if alone else model.hf)
            if ends:
                one_by_one(model.hf)
            found.append((output, counted(model)))
    return found


def agree(found: list[tuple[torch.Tensor, Any]]) -> bool:
    (got, counts), (want, wanted) = found
    return torch.equal(got, want) and counts == wanted


@contextmanager
def hook(module: Any, act: Callable[..., Any] = lambda *args: None) -> Iterator[None]:
    handle = module.register_forward_hook(act)
    yield
    handle.remove()


def test_embeddings_that_are_not_contiguous(load: Callable[..., Any]) -> None:
    given = torch.randn(2, 6, 64)[:, 1:]

    @torch.no_grad()
    def use(hf: Any) -> torch.Tensor:
        one: torch.Tensor = hf(inputs_embeds=given[:1, :1]).logits
        return torch.cat([hf(inputs_embeds=given).logits.flatten(), one.flatten()])

    assert agree(both(load, use))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_hooks_on_all_modules_that_change_numbers(
    load: Callable[..., Any], before: bool, number: int, passes: list[int]
) -> None:
    def use(hf: Any) -> torch.Tensor:
        layer = layers_of(hf)[number]

        def act(module: Any, args: Any, output: Any = None) -> None:
            if module is layer:
                (args[0] if before else output).mul_(1.5)

        first = one_by_one(hf)
        register = register_module_forward_pre_hook if before else register_module_forward_hook
        handle = register(act)
        try:
            hooked = one_by_one(hf)
        finally:
            handle.remove()
        assert not torch.equal(hooked, first)
        return torch.cat([first, hooked, one_by_one(hf)])

    assert agree(both(load, use))
    assert passes == [LAYERS] * 2 * len(IDS)


@pytest.mark.parametrize("part", ["mlp.gate", "self_attn.q_proj", "input_layernorm"])
def test_a_hook_on_all_modules_is_called_with_those_of_a_layer(load: Callable[..., Any], part: str) -> None:
    def use(hf: Any) -> torch.Tensor:
        module, seen = layers_of(hf)[1].get_submodule(part), []
        handle = register_module_forward_pre_hook(lambda called, args: seen.append(called is module))
        try:
            one_by_one(hf)
        finally:
            handle.remove()
        return torch.tensor(sum(seen))

    found = both(load, use)
    assert agree(found)
    assert found[0][0] == len(IDS) + 1  # with the trial of the cache


@pytest.mark.parametrize("inference", [False, True])
def test_numbers_that_change_between_two_layers(load: Callable[..., Any], inference: bool) -> None:
    def use(hf: Any) -> torch.Tensor:
        with torch.inference_mode(inference):
            return Loop(hf)([0, 1, 2, 3], before=lambda number, x: x.mul_(1.5) if number == 2 else None)

    assert agree(both(load, use))


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 0, 1, 2], [0, 2, 1, 3], [0, 1, 1, 2], [0, 0, 1], [2, 0]])
def test_a_caller_with_another_order(load: Callable[..., Any], order: list[int]) -> None:
    assert agree(both(load, lambda hf: Loop(hf)(order), ends=True))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3]])
def test_layers_that_are_left_out(load: Callable[..., Any], order: list[int], passes: list[int]) -> None:
    assert agree(both(load, lambda hf: Loop(hf)(order), ends=True))
    assert passes == [LAYERS] * (4 + len(IDS))


def test_layers_behind_one_with_a_hook_leave_those_before_it(
    load: Callable[..., Any], passes: list[int]
) -> None:
    def use(hf: Any) -> torch.Tensor:
        with hook(layers_of(hf)[2].mlp):
            return one_by_one(hf)

    assert agree(both(load, use))
    assert passes == [2] * len(IDS)


def test_a_forward_that_fails_between_two_layers(load: Callable[..., Any], passes: list[int]) -> None:
    """The next call is one of a layer that was not computed ahead, and of fewer keys."""

    def use(hf: Any) -> torch.Tensor:
        loop = Loop(hf)

        def fail(number: int, x: torch.Tensor) -> None:
            if number == 1:
                raise InterruptedError

        with hook(loop.layers[2].mlp):
            with pytest.raises(InterruptedError):
                loop([0, 1, 2, 3], before=fail)
            with torch.no_grad():
                output: torch.Tensor = loop.layers[3](torch.ones(1, 1, 64), **loop.kwargs(0))
        return output

    assert agree(both(load, use))
    assert passes == [2]


def test_an_interrupt_leaves_the_counts(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while layers are computed, though nobody expects one."""
    with load() as model:
        Loop(model.hf)  # tries the model, which counts
        one_by_one(model.hf)
        want = counted(model)

    def interrupted(status: int) -> None:
        check(status)
        signal.raise_signal(signal.SIGINT)

    with load() as model, torch.no_grad():
        loop = Loop(model.hf)
        with monkeypatch.context() as patch:
            patch.setattr(token_layers, "check", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.layers[0](torch.ones(1, 1, 64), **loop.kwargs(0))
        one_by_one(model.hf)
        assert counted(model) == want


def test_a_forward_that_ends_early_keeps_no_cache(load: Callable[..., Any], passes: list[int]) -> None:
    with load() as model, torch.no_grad():
        loop = Loop(model.hf)
        kwargs = {**loop.kwargs(0), "attention_mask": torch.zeros(1, 1, 1, 1)}
        loop.layers[0](torch.ones(1, 1, 64), **kwargs)
        assert passes == [LAYERS]
        kept = [weakref.ref(kwargs["past_key_values"]), weakref.ref(kwargs["attention_mask"])]
        kept.append(weakref.ref(kwargs["past_key_values"].layers[1].direct(None).keys))
        del kwargs, loop
        gc.collect()
        assert [one() for one in kept] == [None] * 3


def test_a_batch_comes_first(load: Callable[..., Any], passes: list[int]) -> None:
    """Whose layers have different masks."""
    with load("gpt_oss", {"sliding_window": 5}, parallel=2) as model:
        together(model.hf, [IDS[:2], IDS[3:5]], 2)
        passes.clear()
        one_by_one(model.hf)
        assert passes == [3] * len(IDS)


CUTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "training": (lambda layer: layer.train(), lambda layer: layer.eval()),
    "a router's top_k": (
        lambda layer: setattr(layer.mlp.gate, "top_k", 1),
        lambda layer: setattr(layer.mlp.gate, "top_k", 2),
    ),
    "a forward of its own": (
        lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
        lambda layer: delattr(layer.mlp, "forward"),
    ),
    "training, and other weights": (lambda layer: layer.train(), lambda layer: moved(layer).eval()),
    "experts that are watched": (
        lambda layer: setattr(layer.mlp.experts, "seam", Seam()),
        lambda layer: setattr(layer.mlp.experts, "seam", None),
    ),
    "another norm": (lambda layer: swap(layer), lambda layer: swap(layer)),
}


class Seam:
    def run(self, experts: Any, *args: Any) -> Any:
        return experts.answer(*args)


def moved(layer: Any) -> Any:
    for name, weight in layer.named_parameters():
        if "experts" not in name:
            weight.data = weight.data * 1.5
    return layer


def swap(layer: Any) -> None:
    layer.other = vars(layer).get("other", (torch.nn.RMSNorm(64),))
    layer.other, layer.input_layernorm = (layer.input_layernorm,), layer.other[0]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_layer_that_comes_back(
    load: Callable[..., Any], cut: str, number: int, passes: list[int], taken: list[int]
) -> None:
    leave, back = CUTS[cut]

    def use(hf: Any) -> torch.Tensor:
        layer, outputs = layers_of(hf)[number], [one_by_one(hf)]
        leave(layer)
        outputs.append(one_by_one(hf))
        back(layer)
        return torch.cat([*outputs, one_by_one(hf)])

    assert agree(both(load, use))
    full, fewer = [LAYERS] * len(IDS), [number] * len(IDS) * (number > 1)
    assert passes == full + fewer + full
    assert len(taken) <= 3, "found out anew only when something has changed"


def test_a_hook_that_is_removed(load: Callable[..., Any], passes: list[int], taken: list[int]) -> None:
    def use(hf: Any) -> torch.Tensor:
        with hook(layers_of(hf)[2].self_attn):
            hooked = one_by_one(hf)
        return torch.cat([hooked, one_by_one(hf)])

    assert agree(both(load, use))
    assert passes == [2] * len(IDS) + [LAYERS] * len(IDS)
    assert taken == [2, LAYERS]


def test_a_hook_that_replaces_what_goes_on_leaves_the_counts(load: Callable[..., Any]) -> None:
    def use(hf: Any) -> torch.Tensor:
        with hook(hf.model.layers[1], lambda module, args, output: output * 1.5):
            return one_by_one(hf)

    assert agree(both(load, use))
