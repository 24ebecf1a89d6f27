"""A model on several cards: how it is cut, and that the cut shows in nothing but where things are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import DoesNotFitError
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.device_map import device_map
from moe_local.offload.checkpoint.hub import config_of
from moe_local.offload.checkpoint.spec import ModelSpec, meta_model, model_spec
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import footprint
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.cards import Cards
from moe_local.offload.plan.fit import fit, plan_load, plan_request
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Plan, Request
from support import tiny_models

torch.set_num_threads(1)
GIB = 2**30
CPU = torch.device("cpu")
MIXTRAL = model_spec(config_of("mixtral-8x7b"))
QWEN = model_spec(config_of("qwen3-30b-a3b"))
SPECS = (MIXTRAL, QWEN)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.getbasetemp() / "cards-home"))


def request(*cards: int, spec: ModelSpec = MIXTRAL, **changes: Any) -> Request:
    return Request(
        **{"model": "m", "spec": spec, "vram": sum(cards), "ram": 2**40, "cards": cards, **changes}
    )


def mine(plan: Plan, card: int) -> list[int]:
    return [layer for layer in range(len(plan.vram_slots)) if plan.card_of(layer) == card]


def check(plan: Plan) -> None:
    """Every layer is on one card, in order, and no card is promised more than it has."""
    starts = [0, *(card.layers.stop for card in plan.cards[:-1])]
    assert [card.layers.start for card in plan.cards] == starts
    assert plan.cards[-1].layers.stop == plan.request.spec.num_layers
    sizes = footprint.expert_bytes(plan.request.spec, plan.request.experts)
    ring = plan.vram_staging * max(sizes)
    used = 0
    for number, card in enumerate(plan.cards):
        found = plan.on_card(number)
        assert found["used"] <= card.vram == plan.request.cards[number]
        slots = sum(plan.vram_slots[at] * sizes[at] for at in mine(plan, number))
        assert found["used"] == card.fixed + slots + (ring if mine(plan, number) else 0)
        assert found["staging"] == (plan.vram_staging if mine(plan, number) else 0)
        used += found["used"]
    assert used == plan.used()["vram"]


cards_of_any_size = st.lists(st.integers(2**24, 60 * GIB), min_size=2, max_size=4)


class TestPlan:
    def test_no_more_cards_are_used_than_there_are_layers(self) -> None:
        """The demo has 5: where it does not fit, what lacks is that of 5 cards, and it is found."""
        plan = fit("demo", vram="8x1MiB")
        assert not plan.fits
        assert "more on each of 5 cards" in str(plan.reason)
        assert str(plan.nearest).startswith("--vram 5x")
        check(fit("demo", vram="8x8MiB"))

    def test_equal_cards_get_equal_parts(self) -> None:
        plan = place(request(12 * GIB, 12 * GIB))
        check(plan)
        assert [card.layers for card in plan.cards] == [range(16), range(16, 32)]
        assert set(plan.vram_slots) == {6, 7}
        halves = [sum(plan.vram_slots[at] for at in mine(plan, card)) for card in (0, 1)]
        assert abs(halves[0] - halves[1]) <= 1
        assert plan.to_dict()["cards"][1]["layers"] == [16, 31]

    def test_two_cards_hold_about_what_one_of_both_would(self) -> None:
        one = place(request(spec=QWEN, vram=16 * GIB))
        two = place(request(8 * GIB, 8 * GIB, spec=QWEN))
        check(two)
        twice = two.bytes.workspace + one.bytes.expert * 2  # workspace and CUDA itself twice, and two rests
        assert sum(two.vram_slots) >= sum(one.vram_slots) - twice // two.bytes.expert

    def test_unequal_cards_get_as_many_slots_a_layer(self) -> None:
        plan = place(request(8 * GIB, 20 * GIB, dense="nf4"))
        check(plan)
        assert len(mine(plan, 0)) < len(mine(plan, 1)) / 2
        assert max(plan.vram_slots) - min(plan.vram_slots) <= 1

    def test_what_is_left_over_is_spread_over_the_cards(self) -> None:
        plan = place(request(24 * GIB, 24 * GIB))
        check(plan)
        assert plan.mode == "resident"
        assert abs(plan.on_card(0)["used"] - plan.on_card(1)["used"]) < 2 * 8 * plan.bytes.expert

    def test_one_card_that_holds_everything_is_enough(self) -> None:
        plan = plan_request(request(spec=QWEN, vram=None), [24 * GIB, 24 * GIB])
        assert (plan.mode, plan.cards, plan.request.vram) == ("resident", (), 24 * GIB)
        assert plan_request(request(vram=None), [24 * GIB, 24 * GIB]).request.cards == (24 * GIB, 24 * GIB)
        assert plan_request(request(vram=None), []).request.vram is None

    def test_slots_that_are_asked_for(self) -> None:
        plan = place(request(10 * GIB, 16 * GIB, slots=4))
        check(plan)
        assert set(plan.vram_slots) == {4}

    def test_a_short_chunk_where_a_long_one_does_not_fit(self) -> None:
        lacking = place(request(4 * GIB, 4 * GIB, spec=QWEN, context=32768)).shortfall_bytes
        plan = place(request(4 * GIB + lacking, 4 * GIB + lacking, spec=QWEN, context=32768))
        check(plan)
        assert plan.chunk < footprint.PREFILL_CHUNK
        assert set(plan.vram_slots) == {8}

    def test_prompts_have_a_ring_on_each_card(self) -> None:
        """As large as one card's, after the least slots and the chunk."""
        for spec in SPECS:
            one, two = place(request(spec=spec, vram=12 * GIB)), place(request(10 * GIB, 6 * GIB, spec=spec))
            check(two)
            assert two.vram_staging == one.vram_staging >= 2
            assert [card["staging"] for card in two.to_dict()["cards"]] == [two.vram_staging] * 2
        asked = request(10 * GIB, 10 * GIB, ram=12 * GIB, slots=4)
        two = place(asked)
        check(two)
        assert (two.vram_staging, two.ram_staging) == (2, 2)
        assert two.used()["ram"] <= 12 * GIB
        assert place(request(24 * GIB, 24 * GIB)).vram_staging == 0, "every expert has a slot"
        assert (
            place(dataclasses.replace(asked, slots=8, cards=(24 * GIB,) * 2, vram=48 * GIB)).vram_staging == 0
        )

    def test_rather_half_the_chunk_than_no_ring(self) -> None:
        lacking = place(request(3 * GIB, 3 * GIB)).shortfall_bytes
        low, high = 3 * GIB + lacking, 6 * GIB
        seen = []
        for card in range(low, high, (high - low) // 60):
            plan = place(request(card, card))
            check(plan)
            seen.append((plan.vram_staging, plan.chunk))
            if not plan.vram_staging and plan.chunk > footprint.MIN_CHUNK:
                assert not Cards.of(plan.request, plan.chunk // 2).with_ring(2).staging
        longest = max(chunk for _, chunk in seen)
        assert seen[0][1] < longest
        assert seen[-1] == (2, longest)
        assert (2, longest // 2) in seen

    def test_what_does_not_fit_says_how_much_each_card_lacks(self) -> None:
        plan = plan_request(request(vram=None), [3 * GIB, 4 * GIB])
        assert not plan.fits
        assert plan.nearest is not None
        assert plan.nearest.startswith("--vram 2x")
        with pytest.raises(DoesNotFitError, match=r"more on each of 2 cards of 3.00 GiB, 4.00 GiB") as caught:
            plan.check()
        assert "\n" not in str(caught.value)
        sizes = LoadOptions(vram=plan.nearest.removeprefix("--vram ")).vram
        assert isinstance(sizes, tuple)
        assert place(request(*sizes)).fits
        enough = [card + plan.shortfall_bytes for card in plan.request.cards]
        assert place(request(*enough)).fits
        assert not place(request(*(card - 1 for card in enough))).fits

    @settings(max_examples=50, deadline=None)
    @given(
        cards=cards_of_any_size,
        more=st.integers(0, 8 * GIB),
        spec=st.sampled_from(SPECS),
        dense=st.sampled_from(["auto", "nf4"]),
        context=st.integers(1, 32768),
        experts=st.sampled_from(["nf4", "bf16"]),
        slots=st.none() | st.integers(8, 20),
    )
    def test_any_cards(
        self,
        cards: list[int],
        more: int,
        spec: ModelSpec,
        dense: str,
        context: int,
        experts: str,
        slots: int | None,
    ) -> None:
        asked = request(*cards, spec=spec, dense=dense, context=context, experts=experts, slots=slots)
        larger = [*cards[:-1], cards[-1] + more]
        before, after = place(asked), place(dataclasses.replace(asked, vram=sum(larger), cards=tuple(larger)))
        assert after.fits >= before.fits
        if not before.fits:
            assert before.shortfall_bytes > 0
            assert before.cards == ()
            return
        check(before)
        if slots is not None:
            assert set(before.vram_slots) == {min(slots, spec.num_experts)}
        assert min(before.vram_slots) >= spec.top_k
        assert min(after.vram_slots) >= min(before.vram_slots)
        # a cut elsewhere may leave a rest of less than an expert on each card
        assert sum(after.vram_slots) > sum(before.vram_slots) - len(cards)

    def test_fit_plans_cards_anywhere(self) -> None:
        plan = fit("mixtral-8x7b", vram="2x24GiB", ram="64GiB")
        assert len(plan.cards) == 2
        assert fit("mixtral-8x7b", vram=["24GiB", "24GiB"], ram="64GiB") == plan
        assert fit("mixtral-8x7b", vram="48GiB", ram="64GiB").to_dict()["cards"] == []

    def test_a_load_uses_what_is_free_on_each_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = {0: 23 * GIB, 1: 11 * GIB}
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 24 * GIB))
        monkeypatch.setattr("moe_local.offload.plan.fit.free_ram", lambda reserve=True: 100 * GIB)
        devices = [torch.device("cuda", index) for index in range(2)]
        for vram, expected in (
            (None, (23 * GIB - 24 * GIB // 32, 11 * GIB - 24 * GIB // 32)),
            ("20GiB", (20 * GIB, 11 * GIB)),
            ("12GiB,8GiB", (12 * GIB, 8 * GIB)),
        ):
            options = LoadOptions(vram=vram, ram=64 * GIB)  # type: ignore[arg-type]
            plan = plan_load("m", MIXTRAL, options, devices, Bandwidths())
            assert plan.request.cards == expected
        options = LoadOptions(vram="20GiB", ram=64 * GIB)  # type: ignore[arg-type]
        plan = plan_load("m", MIXTRAL, options, devices[:1], Bandwidths())
        assert (plan.request.vram, plan.request.cards) == (20 * GIB, ())


# Where modules go

TWO = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_every_weight_has_a_card(model_type: str) -> None:
    model = meta_model(tiny_models.tiny_config(model_type))
    spec = model_spec(tiny_models.tiny_config(model_type), model)
    found = device_map(model, [1, spec.num_layers], TWO)
    names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    for name in names:
        holders = [key for key in found if name == key or name.startswith(f"{key}.")]
        assert len(holders) == 1, (name, holders)
    placed = {name: found[key] for name in names for key in found if name.startswith(f"{key}.")}
    for layer in spec.layers:
        at = layer.name.split(".")
        number = next(part for part in at if part.isdigit())
        inside = [device for name, device in placed.items() if f"layers.{number}." in name]
        assert set(inside) == {"cuda:0" if number == "0" else "cuda:1"}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert found["lm_head"] == ("cuda:0" if tied else "cuda:1")
    assert all(device == "cuda:0" for name, device in found.items() if "embed" in name or "rotary" in name)


def test_a_tied_head_stays_with_the_embeddings() -> None:
    model = meta_model(tiny_models.tiny_config("mixtral", tie_word_embeddings=True))
    found = device_map(model, [2, 3], TWO)
    assert found["lm_head"] == found["model.embed_tokens"] == "cuda:0"
    assert found["model.norm"] == found["model.layers.2"] == "cuda:1"
    assert found["model.layers.1"] == "cuda:0"


# Whole models on two fake cards


def two_cards(checkpoint: Checkpoint, slots: int | None, room: int) -> tuple[Plan, LoadOptions]:
    """A plan on two small cards, the second with more room, that puts something on both."""
    base = Request("tiny", checkpoint.spec, GIB, 2, "fp32", "auto", 256, slots, cards=(1, 1))
    needed = place(base).shortfall_bytes
    cards = (needed + room, needed + 2 * room)
    plan = place(dataclasses.replace(base, vram=sum(cards), cards=cards)).check()
    options = LoadOptions(experts="fp32", context=256, slots=slots, miss="fetch")
    return plan, options


@pytest.mark.parametrize(
    ("model_type", "slots", "prefetch"),
    [("mixtral", 2, "off"), ("mixtral", 3, "router"), ("mixtral", 8, "off"), ("qwen3_moe", 3, "router")],
)
def test_ids_are_those_of_one_card(
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    model_type: str,
    slots: int,
    prefetch: str,
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(model_type))
    file = open_experts(checkpoint, "fp32")
    prompt = list(range(3, 60))
    found = []
    plan, options = two_cards(checkpoint, slots, 1 << 20)
    options = dataclasses.replace(options, prefetch=prefetch)
    single = place(Request("tiny", checkpoint.spec, GIB, GIB, "fp32", "auto", 256, slots)).check()
    assert (single.vram_staging, single.ram_staging) == (plan.vram_staging, plan.ram_staging)
    assert (plan.vram_staging >= 2) == (slots < checkpoint.spec.num_experts)
    for chosen, devices in ((single, [make_device(1)]), (plan, [make_device(2), make_device(3)])):
        with assemble(checkpoint, file, chosen, options, [CPU] * len(devices), devices) as model:
            out = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
            found.append((out.token_ids, out.stats.hits, out.stats.misses))
            model.check_integrity()
            assert all(device.faults == [] for device in devices)
            arena = model._open().store.tier.arena
            strides = [arena.buffer(at, 0).numel() for at in range(len(chosen.vram_slots))]
            for number, device in enumerate(devices):
                layers = mine(chosen, number)
                ring = chosen.vram_staging * max(strides)
                assert device.allocated == ring + sum(chosen.vram_slots[at] * strides[at] for at in layers)
                if len(devices) > 1:
                    planned = chosen.on_card(number)["used"] - chosen.cards[number].fixed
                    assert device.allocated == planned
                assert device.copies > 0
    assert len(plan.cards) == 2
    if prefetch == "off":
        assert found[0] == found[1]
    else:
        assert found[0][0] == found[1][0]


def test_a_card_of_dense_layers_alone_has_no_ring(
    make_checkpoint: Callable[..., Path], make_device: Callable[..., Any]
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("deepseek_v3"))  # its first layer has no experts
    base = Request("tiny", checkpoint.spec, GIB, 2, "fp32", "auto", 256, 3, cards=(1, 1))
    least = place(base).shortfall_bytes + 1
    cards = (least, least + (1 << 20))
    plan = place(dataclasses.replace(base, vram=sum(cards), cards=cards)).check()
    rings = [card["staging"] for card in plan.to_dict()["cards"]]
    assert (mine(plan, 0), rings) == ([], [0, 2])
    options = LoadOptions(experts="fp32", context=256, slots=3, miss="fetch")
    devices = [make_device(1), make_device(2)]
    with assemble(checkpoint, open_experts(checkpoint, "fp32"), plan, options, [CPU, CPU], devices) as model:
        model.generate(list(range(3, 60)), max_new_tokens=4, eos_token_id=None)
        model.check_integrity()
        assert model.plan.vram_staging == 2
        for number, device in enumerate(devices):
            assert device.allocated == plan.on_card(number)["used"] - plan.cards[number].fixed
    assert plan.used()["vram"] == sum(plan.on_card(number)["used"] for number in (0, 1))


def test_a_model_is_loaded_by_its_device_map(make_checkpoint: Callable[..., Path], monkeypatch: Any) -> None:
    """transformers takes the map as it is made; here both cards are the CPU."""
    from moe_local.offload import load as load_module

    checkpoint = Checkpoint.open(make_checkpoint("mixtral"))
    file = open_experts(checkpoint, "fp32")
    plan, options = two_cards(checkpoint, 3, 1 << 20)
    seen: list[dict[str, str] | None] = []
    skeleton = load_module.load_skeleton

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options["device_map"])
        return skeleton(*args, **options)

    monkeypatch.setattr(load_module, "load_skeleton", spy)
    assemble(checkpoint, file, plan, options, [CPU, CPU], []).close()
    assert seen[0] is not None
    assert seen[0]["model.layers.0"] == "cpu"
    assert len(seen[0]) == 3 + 1 + 3


@pytest.mark.parametrize("short", [0, 1])
def test_the_card_that_is_short_gives_way(
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    short: int,
) -> None:
    monkeypatch.setattr("moe_local.offload.tiers.device_arena.SEGMENT_BYTES", 1)
    monkeypatch.setattr("moe_local.offload.gpu.relief.MARGIN", 0)
    checkpoint = Checkpoint.open(make_checkpoint("mixtral"))
    plan, options = two_cards(checkpoint, 4, 1 << 20)
    devices = [make_device(1), make_device(2)]
    for number, device in enumerate(devices):
        device.torch_device = torch.device("cpu", number)
    with assemble(checkpoint, open_experts(checkpoint, "fp32"), plan, options, [CPU, CPU], devices) as model:
        prompt, settings = list(range(3, 60)), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected = model.generate(prompt, **settings).token_ids
        layer = model.hf.model.layers[-1]  # what was read ahead for it is on its way
        hook = layer.register_forward_pre_hook(out_of_memory_once(short))
        assert model.generate(prompt, **settings).token_ids == expected
        hook.remove()
        model.check_integrity()
        after = model.plan.vram_slots
        assert all(after[at] == 4 for at in mine(plan, 1 - short))
        assert sum(after[at] for at in mine(plan, short)) == 4 * len(mine(plan, short)) - 1
        for number, device in enumerate(devices):
            assert device.allocated == model.plan.on_card(number)["used"] - plan.cards[number].fixed
        assert model.generate(prompt, **settings).token_ids == expected
        model.check_integrity()
        assert all(device.faults == [] for device in devices)


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_card_that_refuses_the_ring_leaves_prompts_to_waves(
    make_checkpoint: Callable[..., Path], make_device: Callable[..., Any], refusing: int
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("mixtral"))
    plan, options = two_cards(checkpoint, 4, 1 << 20)
    ring = plan.vram_staging * plan.bytes.expert
    devices = [make_device(1), make_device(2)]
    devices[refusing].capacity = plan.on_card(refusing)["used"] - plan.cards[refusing].fixed - 1
    with assemble(checkpoint, open_experts(checkpoint, "fp32"), plan, options, [CPU, CPU], devices) as model:
        assert (model.plan.vram_staging, model.plan.vram_slots) == (0, plan.vram_slots)
        assert plan.used()["vram"] - model.plan.used()["vram"] == 2 * ring
        for number, device in enumerate(devices):
            assert device.allocated == model.plan.on_card(number)["used"] - plan.cards[number].fixed
        model.generate(list(range(3, 60)), max_new_tokens=4, eos_token_id=None)
        model.check_integrity()


def out_of_memory_once(card: int) -> Callable[..., None]:
    left = [1]

    def run(*_: Any) -> None:
        if left:
            left.pop()
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 1 bytes. GPU {card} has ...")

    return run
