"""Guesses of later layers: what they are made of, what is requested, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.cache.keys import ExpertKey
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.plan.plan import Request
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.predictor import RouterPredictor
from moe_local.offload.prefetch.prefetch import Guess, NoPrefetch, Prefetcher
from moe_local.offload.prefetch.router_prefetcher import RouterPrefetcher
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.store.build import build_store

IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 8]])


class Loaded:
    """A tiny model over a store, with everything it routed and guessed written down."""

    def __init__(self, folder: Path, out: Path, slots: int) -> None:
        checkpoint = Checkpoint.open(folder)
        cpu = torch.device("cpu")
        self.hf = load_skeleton(folder, checkpoint.config, dense="auto", dtype=torch.float32, device=cpu)
        with Probe(self.hf) as probe, torch.no_grad():
            self.hf(IDS[:, :1])
        self.sites = probe.sites
        file = convert_experts(checkpoint, codec_for("fp32"), out)
        ladders = Request(model="tiny", spec=checkpoint.spec, ram=0, experts="fp32", context=64).ladders
        self.store = build_store(file, checkpoint.spec, ladders=ladders, ram_slots=[slots] * len(ladders))
        self.nbytes = file.nbytes(0, 0)
        self.chosen: list[list[int]] = []
        self.guesses: list[list[Guess]] = []
        self.prefetcher: Prefetcher = NoPrefetch()

    def run_with(self, prefetcher: Prefetcher) -> None:
        self.prefetcher = prefetcher
        predict = prefetcher.predict

        def noting(layer: int, tokens: int) -> list[Guess]:
            self.guesses.append(predict(layer, tokens))
            return self.guesses[-1]

        prefetcher.predict = noting  # type: ignore[method-assign]
        runner = ExpertRunner(self.store, prefetcher)
        for module in self.hf.modules():
            if isinstance(module, OffloadedExperts):
                module.attach(runner)
                module.register_forward_pre_hook(lambda module, args: self.chosen.append(args[1].tolist()))

    def prefetch(self, lookahead: int = 1) -> RouterPrefetcher:
        made = RouterPrefetcher(self.store, RouterPredictor(self.store, self.sites), lookahead=lookahead)
        self.run_with(made)
        return made


@pytest.fixture
def make_loaded(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Loaded]]:
    made: list[Loaded] = []

    def make(model_type: str = "mixtral", slots: int = 4) -> Loaded:
        made.append(Loaded(make_checkpoint(model_type), tmp_path / f"{len(made)}", slots))
        return made[-1]

    yield make
    for loaded in made:
        loaded.prefetcher.close()
        loaded.store.check_integrity()
        loaded.store.close()


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "deepseek_v3"]
)
def test_a_router_asked_about_its_own_residual_says_what_it_chose(
    make_loaded: Callable[..., Loaded], model_type: str
) -> None:
    loaded = make_loaded(model_type)
    loaded.run_with(NoPrefetch())
    residuals: list[torch.Tensor] = []
    for site in loaded.sites:
        assert site is not None
        site.norm.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
    with torch.no_grad():
        loaded.hf(IDS)
        for site, residual, chosen in zip(loaded.sites, residuals, loaded.chosen, strict=True):
            assert site is not None
            weights, index = site.route(residual)
            assert index.tolist() == chosen
            assert weights.shape == index.shape


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_guesses_are_later_routers_on_todays_residual(
    make_loaded: Callable[..., Loaded], model_type: str, lookahead: int
) -> None:
    loaded = make_loaded(model_type)
    residuals: list[torch.Tensor] = []
    for site in loaded.sites:
        assert site is not None
        site.norm.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
    loaded.prefetch(lookahead)
    with torch.no_grad():
        loaded.hf(IDS[:, :1])
    layers = len(loaded.sites)
    for layer, guesses in enumerate(loaded.guesses):
        assert [(guess.layer, guess.distance) for guess in guesses] == [
            (layer + distance, distance) for distance in range(1, lookahead + 1) if layer + distance < layers
        ]
        for guess in guesses:
            site = loaded.sites[guess.layer]
            assert site is not None
            with torch.no_grad():
                normed = site.norm(residuals[layer])
                outputs = site.router(normed.reshape(-1, normed.shape[-1]))
            index = next(t for t in outputs if not t.is_floating_point())
            assert guess.ranked.tolist() == index[0].tolist()


def test_several_tokens_rank_by_the_weight_an_expert_gets_in_all(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded(slots=8)
    residuals: list[torch.Tensor] = []
    for site in loaded.sites:
        assert site is not None
        site.norm.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
    loaded.prefetch()
    with torch.no_grad():
        loaded.hf(IDS[:, :3])
        for layer in (0, 1):
            site = loaded.sites[layer + 1]
            assert site is not None
            weights, index = site.route(residuals[layer])
            total = dict.fromkeys(range(8), 0.0)
            for expert, weight in zip(index.flatten().tolist(), weights.flatten().tolist(), strict=True):
                total[expert] += weight
            want = [expert for expert in sorted(total, key=lambda e: -total[e]) if total[expert] > 0]
            (guess,) = loaded.guesses[layer]
            got = guess.ranked.tolist()
            assert [expert for expert in got if expert < 8] == want
            assert len(got) == 6  # three tokens, top-2: there cannot be more


def test_nobody_asks_for_experts_that_no_token_chose(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded(slots=8)
    loaded.prefetch()
    asked: list[tuple[int, list[int], int]] = []

    def prefetch(layer: int, experts: list[int], *, distance: int, budget_bytes: int) -> list[int]:
        asked.append((layer, list(experts), budget_bytes))
        return []

    loaded.store.prefetch = prefetch  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        loaded.hf(IDS.expand(3, -1)[:, :2])
    assert len(asked) == 2
    for layer, experts, budget in asked:
        assert 2 <= len(experts) <= 4
        assert len(set(experts)) == len(experts)
        assert set(experts) <= set(range(8))
        assert 8 <= budget / loaded.nbytes <= 8 + 4, "and what the layer itself waits for"
        assert layer in (1, 2)


@pytest.mark.parametrize("slots", [2, 4])
def test_no_more_guesses_than_slots_are_ever_under_way(
    make_loaded: Callable[..., Loaded], read_gate: Any, slots: int
) -> None:
    loaded = make_loaded(slots=slots)
    prefetcher = loaded.prefetch()
    read_gate.shut()
    for layer, ranked in ((1, [0, 1, 2, 3, 4, 5]), (2, [6, 7]), (1, [7, 6])):
        prefetcher.request(layer - 1, [], [Guess(layer, 1, torch.tensor(ranked))], [ranked])
        assert loaded.store.tier.bytes_in_flight == slots * loaded.nbytes
    assert loaded.store.tier.cache.loading(1) == tuple(range(slots))
    read_gate.open()


def test_prefetching_changes_no_number(make_loaded: Callable[..., Loaded]) -> None:
    plain, guessing = make_loaded(slots=2), make_loaded(slots=2)
    plain.run_with(NoPrefetch())
    guessing.prefetch(lookahead=2)
    with torch.no_grad():
        for i in range(6):
            ids = IDS[:, i : i + 1]
            assert torch.equal(plain.hf(ids).logits, guessing.hf(ids).logits)
    counts = guessing.store.snapshot().prefetch
    assert counts.issued > 0
    assert counts.used + counts.late > 0
    assert plain.chosen == guessing.chosen


def test_no_tensor_outlives_its_layer(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded()
    seen: list[weakref.ref[torch.Tensor]] = []
    site = loaded.sites[1]
    assert site is not None
    site.norm.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    prefetcher = loaded.prefetch()
    loaded.hf(IDS)
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None
    held = [*vars(prefetcher).values(), *vars(prefetcher._predictor).values()]
    assert not [value for value in held if torch.is_tensor(value)]


def test_close_takes_the_hooks_off(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded()
    prefetcher = loaded.prefetch()
    hooked = [len(site.norm._forward_pre_hooks) for site in loaded.sites if site is not None]
    assert hooked == [1, 1, 1]
    prefetcher.close()
    prefetcher.close()
    assert [len(site.norm._forward_pre_hooks) for site in loaded.sites if site is not None] == [0, 0, 0]
    with torch.no_grad():
        loaded.hf(IDS)  # goes on without guesses
    assert loaded.guesses == [[], [], []]
    assert loaded.store.snapshot().prefetch.issued == 0


def test_layers_without_a_site_are_passed_over(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded()
    loaded.sites[1] = None
    loaded.prefetch(lookahead=2)
    with torch.no_grad():
        loaded.hf(IDS)
    assert [[guess.layer for guess in guesses] for guesses in loaded.guesses] == [[2], [], []]


@pytest.mark.parametrize("tokens", [1, 7])
def test_plain_calls_with_gradients_or_autocast_work(make_loaded: Callable[..., Loaded], tokens: int) -> None:
    loaded = make_loaded(slots=2)
    loaded.prefetch()
    with torch.no_grad():
        want = loaded.hf(IDS[:, :tokens]).logits
    loaded.hf.requires_grad_(True)
    got = loaded.hf(IDS[:, :tokens]).logits  # by torch throughout
    assert torch.allclose(got.detach(), want, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loaded.hf(IDS[:, :tokens]).logits
    assert bool(torch.isfinite(rounded).all())
    with torch.inference_mode():
        assert torch.equal(loaded.hf(IDS[:, :tokens]).logits, want)
    loaded.store.check_integrity()


def test_a_forward_that_failed_leaves_no_guess_for_another_layer(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded()
    prefetcher = loaded.prefetch()
    site = loaded.sites[2]
    assert site is not None
    site.norm(torch.randn(1, 1, 64))  # as if the layer had then failed before its experts
    assert prefetcher.predict(0, 1) == []
    assert prefetcher.predict(2, 1) == []


def test_what_was_guessed_right_is_there_in_time(make_loaded: Callable[..., Loaded]) -> None:
    loaded = make_loaded(slots=2)
    prefetcher = loaded.prefetch()
    prefetcher.request(0, [], [Guess(1, 1, torch.tensor([6, 3, 8]))], [[6, 3, 8]])
    while loaded.store.tier.loading:
        loaded.store.tier.source.wait(0.1)
        loaded.store.tier.poll()
    assert set(loaded.store.tier.cache.residents(1)) == {3, 6}
    assert loaded.store.tier.cache.slot_of(*ExpertKey(1, 3)) is not None
    prefetcher.request(
        0, [], [Guess(1, 1, torch.tensor([8, 8]))], [[8, 8]]
    )  # nobody was chosen: nothing to do
    assert not loaded.store.tier.loading
