"""Recording routes, replaying them without a model, and driving a model with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import moe_local
from moe_local.cache.errors import RoutesError
from moe_local.cache.replay import replay
from moe_local.cache.routes import LayerRoute, Phase, Routes, RouteStep, read_routes, write_routes
from moe_local.offload.measure.prompts import long_prompt
from moe_local.offload.measure.routing import RouteRecorder, playing, running
from moe_local.offload.measure.sample import Sample, Taker
from moe_local.offload.measure.variants import expert_runner
from moe_local.offload.prefetch.prefetch import NoPrefetch

TOKENS, PROMPT = 14, 11


def answered(model: moe_local.Model, recorder: RouteRecorder | None = None, number: int = 0) -> Sample:
    """A prompt, then tokens from an empty cache, without prefetch."""
    store, runner = model.parts.store, expert_runner(model)
    prefetcher, runner.prefetcher = runner.prefetcher, NoPrefetch()
    model.parts.engine.forget()
    todo = [store.empty]
    taker = Taker(
        model,
        TOKENS,
        answering=None if recorder is None else recorder.answering,
        before=lambda: todo.pop()() if todo else None,
    )
    taker.answer(long_prompt(model.tokenizer, number, PROMPT))
    runner.prefetcher = prefetcher
    return taker.sample


@pytest.fixture(scope="module")
def recorded(loaded: moe_local.Model) -> tuple[Routes, Sample]:
    recorder = RouteRecorder(loaded, expert_runner(loaded))
    with running(loaded, recorder):
        answer = answered(loaded, recorder)
    return recorder.routes(), answer


def test_every_token_is_a_step_of_every_layer(recorded: tuple[Routes, Sample], tmp_path: Path) -> None:
    routes, _ = recorded
    assert (routes.arch, routes.num_experts, routes.top_k, len(routes.layers)) == ("mixtral", 8, 2, 3)
    phases = [step.phase for step in routes.steps]
    assert phases == [Phase.PREFILL] * PROMPT + [Phase.DECODE] * (TOKENS - 1)
    assert [step.step for step in routes.steps] == list(range(PROMPT + TOKENS - 1))
    for step in routes.steps:
        assert [route.layer for route in step.layers] == [0, 1, 2]
        for route in step.layers:
            assert sum(route.weights) == pytest.approx(1, abs=1e-4)
            size = routes.layers[route.layer].expert
            assert route.moved_bytes == tuple(0 if here else size for here in route.resident)
    write_routes(tmp_path / "routes.csv", routes)
    again = read_routes(tmp_path / "routes.csv")
    assert [s.layers[1].experts for s in again.steps] == [s.layers[1].experts for s in routes.steps]


def test_a_replay_counts_what_the_model_counted(recorded: tuple[Routes, Sample]) -> None:
    routes, answer = recorded
    counted = replay(routes, 3, "lru").cold
    steps = [step.counts for step in answer.decode]
    assert counted.hits_by_layer == tuple(sum(s.hits_by_layer[layer] for s in steps) for layer in range(3))
    assert counted.misses_by_layer == tuple(
        sum(s.misses_by_layer[layer] for s in steps) for layer in range(3)
    )
    assert counted.misses > 0


def test_played_back_a_recording_changes_nothing(
    model: moe_local.Model, recorded: tuple[Routes, Sample]
) -> None:
    routes, answer = recorded
    with playing(model, routes) as player:
        again = answered(model)
        assert again.ids == answer.ids
        assert [s.counts.misses for s in again.decode] == [s.counts.misses for s in answer.decode]
        player.rewind()
        assert answered(model).ids == answer.ids


def test_the_recording_chooses_and_not_the_router(
    model: moe_local.Model, recorded: tuple[Routes, Sample]
) -> None:
    """Another top-k, fewer layers, another prompt: the same experts again and again. Not the model's use."""
    routes, _ = recorded
    chosen = LayerRoute(0, (7, 5, 2), (0.5, 0.3, 0.2), (False,) * 3, (0,) * 3)
    steps = tuple(RouteStep(0, phase, number, (chosen,)) for number, phase in enumerate(Phase))
    other = dataclasses.replace(routes, top_k=3, layers=routes.layers[:1], steps=steps)
    own = model.stats().routed
    with playing(model, other):
        sample = answered(model, number=3)
        used = model.stats().routed
    hits = [step.counts.hits for step in sample.decode]
    assert hits == [0] + [9] * (TOKENS - 2)
    assert {tuple(e for e, n in enumerate(layer) if n) for layer in used.counts} == {(2, 5, 7)}
    assert set(used.tokens) == {PROMPT + TOKENS - 1}
    assert model.stats().routed == own


def test_another_models_routes_are_refused(model: moe_local.Model, recorded: tuple[Routes, Sample]) -> None:
    routes, _ = recorded
    before = expert_runner(model)
    with (
        pytest.raises(RoutesError, match=r"has 128 experts a layer, .* has 8"),
        playing(model, dataclasses.replace(routes, num_experts=128)),
    ):
        pass
    prompts_only = dataclasses.replace(routes, steps=tuple(routes.phase(Phase.PREFILL)))
    with pytest.raises(RoutesError, match="without any decode step"), playing(model, prompts_only):
        pass
    assert expert_runner(model) is before
