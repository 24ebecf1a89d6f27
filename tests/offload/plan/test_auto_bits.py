"""experts="auto": how many bits a budget holds, and what they are weighed against where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

import moe_local
from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.allocation.expected import NATS_PER_ERROR, format_error
from moe_local.offload.allocation.misses import TIME_FOR_HARM, MissCost
from moe_local.offload.checkpoint.hub import config_of
from moe_local.offload.checkpoint.spec import ModelSpec, model_spec
from moe_local.offload.plan.auto import FAST_ENOUGH, choose, expected_nats, format_bits
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Plan, Request
from moe_local.offload.quantize.mix import bits_asked, name_of

GIB = 1 << 30


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return model_spec(config_of("mixtral-8x7b"))


def planner(spec: ModelSpec, vram: int, **options: object) -> Callable[[str], Plan]:
    request = Request(model="mixtral-8x7b", spec=spec, ram=64 * GIB, vram=vram, dense="int8")
    return lambda experts: place(replace(request, experts=experts, **options))  # type: ignore[arg-type]


def middling(spec: ModelSpec) -> int:
    """VRAM that holds all experts in between the least and the most bits that are chosen from."""
    sizes = format_bits(spec).values()
    bits = (min(sizes) + max(sizes)) / 2
    return planner(spec, 64 * GIB)("nf4").bytes.fixed + int(bits * spec.expert_numel / 8)


def test_as_many_bits_as_all_experts_have_room_with(spec: ModelSpec) -> None:
    vram = middling(spec)
    plan_of, sizes = planner(spec, vram), format_bits(spec).values()
    chosen = choose(plan_of, spec)
    assert chosen == choose(plan_of, spec)
    bits = bits_asked(chosen)
    assert bits == pytest.approx((min(sizes) + max(sizes)) / 2, abs=0.05)
    assert plan_of(chosen).mode == "resident"
    assert plan_of(name_of(bits + 0.02)).mode != "resident"
    assert choose(planner(spec, 64 * GIB), spec) == "int8"


def test_bits_are_weighed_against_time(spec: ModelSpec) -> None:
    plan_of = planner(spec, 10 * GIB)
    chosen = choose(plan_of, spec)

    def cost(name: str, bits: float) -> float:
        speed = plan_of(name).tokens_per_s
        return TIME_FOR_HARM * expected_nats(spec, bits) - math.log(speed) if speed else math.inf

    best, sizes = cost(chosen, bits_asked(chosen)), format_bits(spec).values()
    low = math.ceil(100 * min(sizes))
    for step in range(low, int(100 * max(sizes)), 50):
        assert best <= cost(name_of(step / 100), step / 100) + 1e-9
    assert plan_of(chosen).mode == "offload"


def test_what_is_there_is_taken_if_it_is_near(spec: ModelSpec) -> None:
    plan_of = planner(spec, middling(spec))
    best = bits_asked(choose(plan_of, spec))
    near, far, more = (name_of(round(best + d, 2)) for d in (-0.1, -0.6, 0.1))
    assert choose(plan_of, spec, ["nf4", near, far, more]) == near
    assert choose(plan_of, spec, ["nf4", far]) == name_of(best)


def test_a_little_more_than_there_is_room_for_is_taken_where_it_costs_little_time(spec: ModelSpec) -> None:
    plan_of = planner(spec, middling(spec))
    best = bits_asked(choose(plan_of, spec))
    hair, bit, far = (name_of(round(best + d, 2)) for d in (0.02, 0.2, 0.5))

    def share(name: str) -> float:
        speed, target = plan_of(name).tokens_per_s, plan_of(name_of(best)).tokens_per_s
        assert speed is not None
        assert target is not None
        return speed / target

    assert share(bit) < FAST_ENOUGH <= share(hair) < 1
    assert choose(plan_of, spec, [far, bit, hair]) == hair
    assert choose(plan_of, spec, [far, bit]) == name_of(best)


def test_expected_harm_lies_between_formats(spec: ModelSpec) -> None:
    sizes = format_bits(spec)
    assert set(sizes) >= {"nf4", "int8"}
    for name, bits in sizes.items():
        assert expected_nats(spec, bits) == pytest.approx(NATS_PER_ERROR * format_error(name))
    assert expected_nats(spec, 1.0) == expected_nats(spec, min(sizes.values()))
    assert expected_nats(spec, 30.0) == expected_nats(spec, max(sizes.values()))
    steps = [expected_nats(spec, bits / 10) for bits in range(20, 90)]
    assert steps == sorted(steps, reverse=True)


def test_fit_says_what_auto_comes_to() -> None:
    plan = moe_local.fit("mixtral-8x7b", vram="40GiB", ram="64GiB", dense="int8", experts="auto")
    assert plan.request.experts.startswith("mixed:")
    assert plan.mode == "resident"
    assert MissCost.of_plan(plan) is None
    less = moe_local.fit("mixtral-8x7b", vram="10GiB", ram="64GiB", dense="int8", experts="auto")
    cost = MissCost.of_plan(less)
    assert cost is not None
    assert cost.resident_share == less.resident_fraction
    nothing = moe_local.fit("mixtral-8x7b", vram="1GiB", ram="64GiB", experts="auto")
    with pytest.raises(DoesNotFitError, match="does not fit"):
        nothing.check()
