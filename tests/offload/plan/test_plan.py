from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import DoesNotFitError, OptionError
from moe_local.cache.keys import parse_bytes
from moe_local.offload.checkpoint.hub import config_of
from moe_local.offload.checkpoint.spec import ModelSpec, meta_model, model_spec
from moe_local.offload.gpu import usable
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import estimate, footprint, placement
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.fit import fit, plan_load, plan_request
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Plan, Request
from support import tiny_models

GIB = 2**30
MIXTRAL = model_spec(config_of("mixtral-8x7b"))
QWEN = model_spec(config_of("qwen3-30b-a3b"))
STATEFUL = model_spec(config_of("qwen3.6-35b-a3b"))
SPECS = {"mixtral-8x7b": MIXTRAL, "qwen3-30b-a3b": QWEN, "qwen3.6-35b-a3b": STATEFUL}


def request(spec: ModelSpec = MIXTRAL, **changes: object) -> Request:
    return Request(**{"model": "m", "spec": spec, "vram": 24 * GIB, "ram": 64 * GIB, **changes})  # type: ignore


def without_states(spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, state_numel=0)


def with_flags(asked: Request, flags: str) -> Request:
    """The request with the flags of a suggestion, read as the command line reads them."""
    words = shlex.split(flags)
    assert len(words) % 2 == 0
    changes: dict[str, object] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--")
        changes[name] = (
            parse_bytes(value) if name in ("vram", "ram") else int(value) if value.isdigit() else value
        )
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def _request(
    name: str, vram: int | None, ram: int, experts: str, dense: str, context: int, extra: int | None
) -> Request:
    spec = SPECS[name]
    slots = None if extra is None else min(spec.num_experts, spec.top_k + extra)
    return Request(name, spec, ram, vram, experts, dense, context, slots)


requests = st.builds(
    _request,
    name=st.sampled_from(sorted(SPECS)),
    vram=st.none() | st.integers(2**24, 100 * GIB),
    ram=st.integers(2**24, 200 * GIB),
    experts=st.sampled_from(["nf4", "bf16", "fp32"]),
    dense=st.sampled_from(["auto", "nf4", "int8", "fp32"]),
    context=st.integers(1, 32768),
    extra=st.none() | st.integers(0, 126),
)


class TestKnownNumbers:
    def test_mixtral_parts(self) -> None:
        plan = place(request())
        assert MIXTRAL.total_numel == 46_702_792_704  # mistralai/Mixtral-8x7B-Instruct-v0.1
        attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
        others = 2 * 32000 * 4096 + 65 * 4096 + 32 * 8 * 4096  # embeddings, norms, routers
        assert plan.bytes.dense == 2 * (attention + others)
        assert plan.bytes.kv == 32 * 2 * 8 * 128 * 8192 * 2
        weights = 3 * 4096 * 14336
        assert plan.bytes.expert / weights * 8 == pytest.approx(4.127, abs=1e-3)
        assert plan.bytes.experts_total == 32 * 8 * plan.bytes.expert

    def test_mixtral_on_24_gb_holds_about_four_fifths(self) -> None:
        plan = place(request())
        assert plan.mode == "offload"
        assert 0.7 < plan.resident_fraction < 0.9
        assert plan.ram_slots == (8,) * 32
        assert plan.assumed

    def test_mixtral_on_48_gb_is_resident(self) -> None:
        plan = place(request(vram=48 * GIB))
        assert (plan.mode, plan.resident_fraction, plan.vram_slots) == ("resident", 1.0, (8,) * 32)

    def test_mixtral_in_12_gib_of_ram_reads_from_disk(self) -> None:
        plan = place(request(ram=12 * GIB))
        assert plan.mode == "disk"
        assert plan.fits
        assert 2 <= plan.ram_slots[0] < 8

    def test_mixtral_on_a_cpu(self) -> None:
        assert place(request(vram=None, ram=32 * GIB)).mode == "resident"
        plan = place(request(vram=None, ram=16 * GIB))
        assert (plan.mode, plan.vram_slots) == ("disk", (0,) * 32)
        assert 2 <= plan.ram_slots[0] < 8

    @pytest.mark.parametrize(("vram", "mode"), [(8, "offload"), (12, "offload"), (24, "resident")])
    def test_qwen3(self, vram: int, mode: str) -> None:
        plan = place(request(QWEN, vram=vram * GIB))
        assert plan.mode == mode
        assert plan.vram_slots[0] >= 8

    @pytest.mark.parametrize("vram", [None, 12 * GIB])
    def test_snapshots_of_states_lie_in_ram(self, vram: int | None) -> None:
        """30 layers with 32 heads of 128 x 128 numbers, and a convolution's last 4 inputs of 8192."""
        asked = request(STATEFUL, vram=vram, ram=14 * GIB, parallel=2)
        assert asked.snapshot_bytes == 2 * 4 * 30 * 4 * (32 * 128 * 128 + 4 * 8192)
        plan, without = place(asked), place(dataclasses.replace(asked, spec=without_states(STATEFUL)))
        assert plan.mode == "disk"
        assert plan.used()["ram"] <= asked.ram
        assert sum(without.ram_slots) > sum(plan.ram_slots)

    @pytest.mark.parametrize(("ram", "shelf"), [(10, 0), (24, 24 * GIB - 256 * 90_898_432), (64, 8 * GIB)])
    def test_ram_that_is_left_over_is_a_shelf(self, ram: int, shelf: int) -> None:
        """Beside Mixtral's 256 experts, if there is room for all of them, and 8 GiB at most."""
        plan = place(request(MIXTRAL, ram=ram * GIB))
        assert plan.used()["ram"] + plan.shelf_bytes <= ram * GIB
        assert plan.shelf_bytes == pytest.approx(shelf, abs=100 * 2**20)

    def test_total_parameters_count_not_active_ones(self) -> None:
        """The 26 GB of active bf16 weights would fit a 48 GB card; all 93 do not."""
        plan = place(request(experts="bf16", vram=48 * GIB, ram=128 * GIB))
        assert MIXTRAL.active_numel * 2 < 48 * GIB
        assert plan.mode == "offload"
        assert plan.bytes.experts_total == 2 * MIXTRAL.expert_numel

    def test_quantized_dense_part_on_cuda_is_what_bitsandbytes_allocates(self) -> None:
        import bitsandbytes as bnb

        config = tiny_models.tiny_config("qwen2_moe")
        spec = model_spec(config, meta_model(config))
        name = next(tensor for tensor in spec.dense if tensor.name in spec.quantizable)
        weight = torch.randn(*name.shape)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        expected = sum(tensor.nbytes for tensor in tensors)
        only = dataclasses.replace(spec, dense=(name,))
        assert footprint.dense_bytes(only, "nf4", cuda=True) == expected
        assert footprint.dense_bytes(only, "int8", cuda=True) == weight.numel() + 4 * weight.shape[0]
        assert footprint.dense_bytes(only, "fp32", cuda=True) == weight.nbytes
        unquantized = dataclasses.replace(only, quantizable=frozenset())
        assert footprint.dense_bytes(unquantized, "nf4", cuda=True) == 2 * weight.numel()

    @pytest.mark.parametrize(("dense", "bits"), [("nf4", 4.127), ("int8", 8.25)])
    def test_on_the_cpu_all_of_mixtral_but_norms_routers_and_embeddings_is_quantized(
        self, dense: str, bits: float
    ) -> None:
        attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
        head, routers, norms = 32000 * 4096, 32 * 8 * 4096, 65 * 4096
        wanted = bits / 8 * (attention + head) + 2 * (head + routers + norms)
        assert footprint.dense_bytes(MIXTRAL, dense, cuda=False) == pytest.approx(wanted, rel=1e-3)


class TestAnyRequest:
    @settings(max_examples=150, deadline=None)
    @given(asked=requests)
    def test_a_fit_keeps_its_budgets_and_slots(self, asked: Request) -> None:
        plan = place(asked)
        if not plan.fits:
            assert plan.shortfall_bytes > 0
            assert plan.mode is None
            return
        used = plan.used()
        assert used["ram"] <= asked.ram
        assert used["vram"] <= (asked.vram or 0)
        fastest = plan.ram_slots if asked.vram is None else plan.vram_slots
        assert min(fastest) >= asked.spec.top_k
        assert max(fastest) <= asked.spec.num_experts
        if asked.slots is not None:
            assert set(fastest) == {asked.slots}
        if asked.vram is not None:
            assert min(plan.ram_slots) >= asked.spec.top_k
        assert (plan.mode == "resident") == (plan.resident_fraction == 1.0)
        assert plan.tokens_per_s is not None
        assert 0 < plan.tokens_per_s <= plan.resident_tokens_per_s <= plan.roofline
        assert (plan.tokens_per_s == plan.resident_tokens_per_s) == (plan.mode == "resident")

    @settings(max_examples=150, deadline=None)
    @given(asked=requests, more=st.integers(0, 8 * GIB))
    def test_more_memory_never_means_less(self, asked: Request, more: int) -> None:
        asked = dataclasses.replace(asked, slots=None)
        larger = dataclasses.replace(asked, ram=asked.ram + more)
        if asked.vram is not None:
            larger = dataclasses.replace(larger, vram=asked.vram + more)
        before, after = place(asked), place(larger)
        assert after.fits >= before.fits
        assert after.resident_fraction >= before.resident_fraction
        if before.fits and after.mode != "resident":
            assert all(a >= b for a, b in zip(after.ram_slots, before.ram_slots, strict=True))
            assert (after.tokens_per_s or 0) >= (before.tokens_per_s or 0) * (1 - 1e-9)

    @settings(max_examples=20, deadline=None)
    @given(asked=requests)
    def test_the_nearest_setting_really_fits(self, asked: Request) -> None:
        plan = plan_request(asked)
        assert (plan.nearest is None) == plan.fits
        if plan.nearest is not None:
            assert place(with_flags(asked, plan.nearest)).fits

    @settings(max_examples=60, deadline=None)
    @given(asked=requests)
    def test_the_shortfall_is_exact(self, asked: Request) -> None:
        """A byte less does not do."""
        asked = dataclasses.replace(asked, ram=asked.ram if asked.vram is None else 2**60)
        plan = place(asked)
        if plan.fits:
            return
        tier = "ram" if asked.vram is None else "vram"
        enough = (getattr(asked, tier) or 0) + plan.shortfall_bytes
        assert place(dataclasses.replace(asked, **{tier: enough})).fits
        assert not place(dataclasses.replace(asked, **{tier: enough - 1})).fits


class TestStaging:
    def test_a_ring_of_two_large_experts_or_of_megabytes_of_small_ones(self) -> None:
        mixtral, qwen = place(request()), place(request(QWEN, vram=8 * GIB))
        assert (mixtral.vram_staging, mixtral.ram_staging) == (2, 0)
        assert qwen.vram_staging * qwen.bytes.expert >= 32 * 2**20
        assert 4 < qwen.vram_staging <= 128 // 4

    def test_where_all_is_resident_there_is_none(self) -> None:
        plan = place(request(vram=48 * GIB))
        assert (plan.mode, plan.vram_staging, plan.ram_staging) == ("resident", 0, 0)

    def test_with_a_part_on_disk_host_memory_has_one_as_well(self) -> None:
        plan = place(request(ram=12 * GIB))
        assert (plan.vram_staging, plan.ram_staging) == (2, 2)
        assert place(request(vram=None, ram=16 * GIB)).ram_staging == 2

    def test_the_least_slots_come_first_then_half_a_chunk_then_the_ring(self) -> None:
        """From the least memory that fits on: no ring, then longer chunks and the ring, then slots."""
        least = place(request(vram=1)).shortfall_bytes + 1
        expert = place(request()).bytes.expert
        seen = []
        for step in range(60):
            plan = place(request(vram=least + step * expert // 4))
            assert plan.fits
            seen.append((plan.chunk, plan.vram_staging, sum(plan.vram_slots)))
        assert seen[0] == (32, 0, 64)
        rings = [ring for _, ring, _ in seen]
        assert set(rings) == {0, 2}
        assert [slots for _, _, slots in seen] == sorted(slots for _, _, slots in seen)
        assert all(slots == 64 for chunk, ring, slots in seen if ring < 2 or chunk < 2048)
        assert seen[-1][:2] == (2048, 2)
        assert seen[-1][2] > 64

    def test_fixed_slots_leave_the_ring_what_room_there_is(self) -> None:
        assert place(request(slots=4)).vram_staging == 2
        tight = place(request(slots=4))
        budget = tight.used()["vram"] - tight.bytes.expert
        plan = place(request(slots=4, vram=budget))
        assert (plan.chunk, plan.vram_staging) == (1024, 2)  # rather half the chunk than no ring

    def test_chunks_are_longer_where_the_workspace_is_small_beside_the_experts(self) -> None:
        total = place(request()).bytes.experts_total
        longest = footprint.longest_chunk
        assert longest(MIXTRAL, 32768, torch.bfloat16, total) == 2048
        assert longest(MIXTRAL, 32768, torch.bfloat16, 20 * total) == 8192
        assert longest(MIXTRAL, 3000, torch.bfloat16, 20 * total) == 3000
        assert longest(MIXTRAL, 100, torch.bfloat16, total) == 100

    def test_an_expert_that_the_cpu_reads_in_place_takes_no_workspace(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(footprint, "library", lambda: object())
        inside = place(request(vram=None)).bytes
        monkeypatch.setattr(footprint, "library", lambda: None)
        without = place(request(vram=None)).bytes
        dequantized = 2 * MIXTRAL.layers[0].expert_numel
        assert without.workspace - inside.workspace == dequantized
        assert place(request()).bytes.workspace >= dequantized

    def test_what_no_kernel_reads_in_place_is_dequantized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(footprint, "library", lambda: object())
        assert footprint.reads_in_place(MIXTRAL, "native")  # bf16
        assert footprint.reads_in_place(model_spec(config_of("deepseek-v3")), "native")  # FP8
        assert footprint.reads_in_place(MIXTRAL, "nf4")
        monkeypatch.setattr(footprint, "FORMATS", {"nf4": 0})
        assert not footprint.reads_in_place(MIXTRAL, "native")
        assert not footprint.reads_in_place(MIXTRAL, "mixed:6")  # int8 among them
        monkeypatch.setattr(footprint, "library", lambda: None)
        assert not footprint.reads_in_place(MIXTRAL, "nf4")


class TestNearest:
    def test_a_little_too_little_shortens_the_context(self) -> None:
        enough = request(context=32768)
        needed = place(dataclasses.replace(enough, vram=1)).shortfall_bytes
        plan = plan_request(dataclasses.replace(enough, vram=needed - 64 * 2**20))
        assert plan.nearest is not None
        assert plan.nearest.startswith("--context ")
        assert int(plan.nearest.split()[1]) >= 16384

    def test_slots_first(self) -> None:
        plan = plan_request(request(vram=12 * GIB, slots=8))
        assert plan.nearest is not None
        assert plan.nearest.startswith("--slots ")

    def test_quantized_experts(self) -> None:
        assert plan_request(request(experts="bf16", vram=12 * GIB)).nearest == "--experts nf4"

    @pytest.mark.parametrize("vram", [None, 24 * GIB])
    def test_of_what_no_memory_holds_nothing_is_near(self, vram: int | None) -> None:
        plan = plan_request(request(vram=vram, parallel=10**12))
        assert plan.nearest is None
        with pytest.raises(DoesNotFitError, match=r"does not fit.* there are$"):
            plan.check()

    def test_both_budgets(self) -> None:
        plan = plan_request(request(vram=3 * GIB, ram=3 * GIB, dense="nf4", context=256))
        assert plan.nearest is not None
        assert "--vram" in plan.nearest
        assert "--ram" in plan.nearest

    def test_the_error_says_what_by_how_much_and_what_would_do(self) -> None:
        plan = plan_request(request(vram=6 * GIB))
        with pytest.raises(DoesNotFitError) as caught:
            plan.check()
        message = str(caught.value)
        assert "m does not fit" in message
        assert "of VRAM" in message
        assert "more than the 6.00 GiB there are" in message
        assert f"{plan.nearest} fits" in message
        assert "\n" not in message


class TestEstimate:
    def test_more_hits_are_faster(self) -> None:
        speeds = [place(request(slots=n)).tokens_per_s for n in range(2, 7)]
        assert speeds == sorted(speeds)  # type: ignore[type-var]
        assert speeds[0] != speeds[-1]

    def test_the_prior_rises_from_nothing_to_all(self) -> None:
        for experts in (8, 128):
            rates = [estimate.hit_rate(n / experts, experts) for n in range(experts + 1)]
            assert rates[0] == 0
            assert rates[-1] == 1
            assert rates == sorted(rates)

    def test_on_demand_agrees_with_the_papers_arithmetic(self) -> None:
        """Mixtral, no hits, PCIe 25 GB/s: 3.8 tok/s at 4.5 bits an expert, so 4.1 at 4.127."""
        traffic = estimate.Traffic(dense=830_000_000, experts=64 * 90_877_952, fastest_share=0, ram_share=1)
        speed = estimate.tokens_per_second(
            traffic, MIXTRAL, Bandwidths(vram=1008e9), cuda=True, dispatch=False
        )
        assert speed == pytest.approx(4.1, abs=0.1)

    def test_a_slower_link_is_slower(self) -> None:
        slow = place(request(bandwidths=Bandwidths(h2d=6e9))).tokens_per_s
        assert slow is not None
        assert slow < (place(request()).tokens_per_s or 0)

    def test_assumed_follows_the_figures_in_use(self) -> None:
        measured = Bandwidths(measured=frozenset({"ram", "disk"}))
        assert not place(request(vram=None, ram=16 * GIB, bandwidths=measured)).assumed
        assert place(request(bandwidths=measured)).assumed
        everything = Bandwidths(measured=frozenset({"vram", "h2d"}))
        assert not place(request(bandwidths=everything)).assumed
        assert place(request(ram=12 * GIB, bandwidths=everything)).assumed, "the disk is in use"


class TestFit:
    def test_what_json_shows(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
        found = fit("mixtral-8x7b", vram="24GiB", ram="64GiB", context=8192).to_dict()
        assert found["fits"] is True
        assert found["mode"] == "offload"
        assert set(found["bytes"]) == {"dense", "kv", "snapshots", "workspace", "expert", "experts_total"}
        assert found["slots"] == {"vram": 6, "ram": 8}
        assert found["staging"] == {"vram": 2, "ram": 0}
        assert found["experts_resident_fraction"] == 220 / 256
        assert found["assumed"] is True
        assert found["parameters"]["total"] == 46_702_792_704
        assert found["shortfall_bytes"] == 0
        assert found["nearest"] is None

    def test_without_vram_or_gpu_it_plans_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        plan = fit("qwen3-30b-a3b", ram="32GiB")
        assert plan.request.vram is None
        assert plan.mode == "resident"
        with pytest.raises(OptionError, match="0 CUDA devices"):
            fit("qwen3-30b-a3b", device="cuda")
        with pytest.raises(OptionError, match="leave one of them out"):
            fit("qwen3-30b-a3b", device="cpu", vram="8GiB")

    def test_a_gpu_is_planned_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(usable, "unusable", lambda index: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * GIB, 24 * GIB))
        plan = fit("mixtral-8x7b", ram="64GiB")
        assert plan.request.vram == 23 * GIB - 24 * GIB // 32

    def test_context_defaults_to_8192_or_the_models(self) -> None:
        assert fit("mixtral-8x7b", vram="24GiB").request.context == 8192
        assert fit("olmoe-1b-7b", vram="24GiB").request.context == 4096
        with pytest.raises(OptionError, match="context 40000 is beyond the 32768 tokens"):
            fit("mixtral-8x7b", vram="24GiB", context=40000)

    def test_what_is_left_over_gives_some_layers_one_more(self) -> None:
        plan = fit("mixtral-8x7b", vram="24GiB", ram="64GiB", context=8192)
        assert set(plan.vram_slots) == {6, 7}
        assert plan.vram_slots == tuple(sorted(plan.vram_slots, reverse=True))
        assert 24 * GIB - plan.used()["vram"] < plan.bytes.expert
        assert plan.resident_fraction == sum(plan.vram_slots) / 256

    def test_slots_below_top_k(self) -> None:
        with pytest.raises(OptionError, match=r"slots 1 is below the 2 experts .* use 2 to 8"):
            fit("mixtral-8x7b", vram="24GiB", slots=1)

    def test_slots_beyond_the_experts_mean_all(self) -> None:
        plan = fit("mixtral-8x7b", vram="48GiB", ram="64GiB", slots=99)
        assert plan.vram_slots == (8,) * 32
        assert plan.mode == "resident"

    @pytest.mark.parametrize("ram", [16 * GIB, 32 * GIB])
    def test_a_load_follows_the_same_plan(self, ram: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("moe_local.offload.plan.fit.free_ram", lambda reserve=True: 50 * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        planned = fit("mixtral-8x7b", ram=ram)
        options = LoadOptions(ram=ram)
        bandwidths = planned.request.bandwidths
        loaded = plan_load("mixtral-8x7b", MIXTRAL, options, [torch.device("cpu")], bandwidths)
        assert loaded == planned

    def test_a_load_refuses_in_the_same_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("moe_local.offload.plan.fit.free_ram", lambda reserve=True: 50 * GIB)
        planned = fit("mixtral-8x7b", ram="4GiB", device="cpu")
        assert planned.reason is not None
        with pytest.raises(DoesNotFitError) as caught:
            plan_load(
                "mixtral-8x7b", MIXTRAL, LoadOptions(ram=4 * GIB), [torch.device("cpu")], Bandwidths()
            ).check()
        assert str(caught.value).startswith(planned.reason)

    def test_a_load_takes_no_memory_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("moe_local.offload.plan.fit.free_ram", lambda reserve=True: 16 * GIB)
        plan = plan_load(
            "mixtral-8x7b", MIXTRAL, LoadOptions(ram=64 * GIB), [torch.device("cpu")], Bandwidths()
        )
        assert plan.request.ram == 16 * GIB
        assert plan.mode == "disk"


def test_a_tiny_budget_for_a_tiny_model() -> None:
    """The demo's size: budgets of a few MiB work as those of many GiB do."""
    spec = model_spec(tiny_models.tiny_config("mixtral"))
    needed = place(Request("tiny", spec, ram=1, context=512)).shortfall_bytes + 1
    assert needed < 4 * 2**20
    plan: Plan = place(Request("tiny", spec, ram=needed, context=512))
    assert plan.mode == "disk"
    assert plan.ram_slots == (2, 2, 2)


@given(room=st.integers(0, 200), more=st.integers(0, 20))
def test_layers_of_different_sizes_never_lose_a_slot_to_more_room(room: int, more: int) -> None:
    sizes = tuple((10 if at % 3 == 0 else 4,) * layer.num_experts for at, layer in enumerate(MIXTRAL.layers))
    least = placement._most_slots(MIXTRAL, sizes, 10 * room)
    larger = placement._most_slots(MIXTRAL, sizes, 10 * room + more)
    assert all(a >= b for a, b in zip(larger, least, strict=True))
    assert max(least) - min(least) <= 1
