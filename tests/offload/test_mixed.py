"""Experts of several formats in one model: the ids are those of the decoded weights, wherever experts are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_local
from moe_local.cache.policies import POLICIES
from moe_local.cache.stats import RoutedTokens
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.spec import experts_modules
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.usage import add_usage
from moe_local.offload.load import assemble
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.fit import plan_load, plan_request
from moe_local.offload.plan.plan import Request
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.mix import Mix
from support import fake_device

torch.set_num_threads(1)

NEW = 8
CPU = torch.device("cpu")
FORMATS = ("nf4", "nf4", "int8", "bf16")


class Mixed:
    """A checkpoint, an expert file of a random mix, and transformers' greedy ids with the decoded weights."""

    def __init__(self, folder: Path, out: Path, seed: int = 0) -> None:
        self.checkpoint = Checkpoint.open(folder)
        spec, chance = self.checkpoint.spec, random.Random(seed)
        formats = [tuple(chance.choices(FORMATS, k=layer.num_experts)) for layer in spec.layers]
        self.mix = Mix("mixed:7", tuple(formats))
        self.file = convert_experts(self.checkpoint, self.mix, out)
        self.prompt = torch.randint(3, 320, (1, 11), generator=torch.Generator().manual_seed(1))
        self.long = torch.randint(3, 320, (1, 70), generator=torch.Generator().manual_seed(2))
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for (_, module), layer in zip(experts_modules(hf), spec.layers, strict=True):
            for expert in range(layer.num_experts):
                layout = self.file.layout(layer.index, expert)
                buffer = torch.frombuffer(self.file.read(layer.index, expert), dtype=torch.uint8)
                decoded = codec_for(layout.format).decode(buffer, layout, torch.float32)
                for name, weight in decoded.items():
                    turned = weight.T if layer.transposed and weight.dim() == 2 else weight
                    getattr(module, name).data[expert].copy_(turned)
        self.expected = [self._ids(hf, prompt) for prompt in (self.prompt, self.long)]

    def _ids(self, hf: Any, prompt: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            ids: torch.Tensor = hf.generate(prompt, max_new_tokens=NEW, eos_token_id=None, do_sample=False)
        return ids

    def load(
        self, device: Any = None, *, slots: int, ram_slots: int = 8, use: Any = None, **options: Any
    ) -> moe_local.Model:
        """With so many experts a layer in the fastest tier and, below a device, about so many in RAM."""
        spec, ladders = self.checkpoint.spec, self.mix.layouts(self.checkpoint.spec)
        mean = sum(layout.nbytes for layer in ladders for layout in layer) / 8
        given = {"slots": slots, "context": 128, "dense": "fp32"}
        request = Request(
            model="tiny",
            spec=spec,
            ram=round(ram_slots * mean) if device is not None else 2**30,
            vram=None if device is None else 2**30,
            experts=self.mix.name,
            mix=self.mix,
            use=use,
            **given,
        )
        settings = LoadOptions(**{"miss": "fetch", **given, **options})
        return assemble(self.checkpoint, self.file, plan_request(request).check(), settings, CPU, device)

    def check(self, model: moe_local.Model) -> None:
        for prompt, expected in zip((self.prompt, self.long), self.expected, strict=True):
            assert torch.equal(model.generate(prompt, max_new_tokens=NEW, eos_token_id=None), expected)
            model.check_integrity()
        used, spec = model.plan.used(), self.checkpoint.spec
        arenas = sum(tier.arena.nbytes for tier in tiers(model))
        assert arenas == sum(used.values()) - model.plan.bytes.fixed
        if model.plan.mode == "resident":
            assert tiers(model)[0].arena.nbytes == self.mix.nbytes(spec)  # not a byte more


def tiers(model: moe_local.Model) -> list[Any]:
    store = model.parts.store
    return [tier for tier in (store.tier, store.below) if tier is not None]


@pytest.fixture(scope="module")
def mixtral(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tiny_mixtral, tmp_path_factory.mktemp("mixed") / "f")


@pytest.fixture(
    scope="module",
    params=[pytest.param(t, marks=pytest.mark.slow) for t in ("qwen3_moe", "deepseek_v3", "gpt_oss")],
)
def other(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: Any
) -> Mixed:
    return Mixed(make_checkpoint(request.param), tmp_path_factory.mktemp("other") / "f", seed=1)


CPU_CASES = [(2, "adaptive", "router"), (3, "lru", "off"), (5, "lfu", "router"), (8, "adaptive", "router")]


@pytest.mark.parametrize(("slots", "policy", "prefetch"), CPU_CASES)
def test_ids_are_those_of_the_decoded_weights(mixtral: Mixed, slots: int, policy: str, prefetch: str) -> None:
    with mixtral.load(slots=slots, policy=policy, prefetch=prefetch) as model:
        mixtral.check(model)
        assert (model.stats().misses > 0) == (slots < 8) == (model.plan.mode == "disk")


DEVICE_CASES = [
    (2, 4, "disk", "auto"),
    (3, 8, "offload", "fetch"),
    (3, 8, "offload", "cpu"),
    (8, 4, "resident", "auto"),
]


@pytest.mark.parametrize(("slots", "ram_slots", "mode", "miss"), DEVICE_CASES)
def test_on_a_device(mixtral: Mixed, slots: int, ram_slots: int, mode: str, miss: str) -> None:
    device = fake_device.FakeDevice(seed=slots, luck=0.2)
    with mixtral.load(device, slots=slots, ram_slots=ram_slots, prefetch="router", miss=miss) as model:
        assert model.plan.mode == mode
        mixtral.check(model)


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [2, 3, 4, 6, 8])
def test_every_policy_and_number_of_slots(mixtral: Mixed, slots: int, policy: str) -> None:
    for prefetch in ("off", "router"):
        with mixtral.load(slots=slots, policy=policy, prefetch=prefetch) as model:
            mixtral.check(model)


def test_other_families(other: Mixed) -> None:
    experts = other.checkpoint.spec.num_experts
    for slots in (other.checkpoint.spec.top_k, 5, experts):
        with other.load(slots=slots, prefetch="router") as model:
            other.check(model)
        with other.load(fake_device.FakeDevice(seed=slots), slots=slots, ram_slots=5, miss="auto") as model:
            other.check(model)


def test_use_decides_which_sizes_slots_have(mixtral: Mixed) -> None:
    """Where only the largest experts were used, theirs are the slots."""
    sizes = [[layout.nbytes for layout in layer.layouts] for layer in mixtral.file.layers]
    use = tuple(tuple(1000 * (size == max(layer)) for size in layer) for layer in sizes)
    with mixtral.load(slots=5, use=use) as model:
        cache = tiers(model)[0]
        for number, layer in enumerate(sizes):
            largest = [slot for slot in range(5) if cache.arena.buffer(number, slot).numel() == max(layer)]
            assert len(largest) == min(5, layer.count(max(layer)))
        mixtral.check(model)


def test_a_load_is_planned_with_what_the_file_holds(mixtral: Mixed, tmp_path: Path) -> None:
    file = convert_experts(mixtral.checkpoint, mixtral.mix, tmp_path / "f")
    spec, options = mixtral.checkpoint.spec, LoadOptions(slots=4, dense="fp32", context=64)
    object.__setattr__(options, "experts", "mixed:7")
    plan = plan_load("tiny", spec, options, [CPU], Bandwidths(), file)
    assert (plan.request.mix, plan.request.use) == (mixtral.mix, None)
    assert plan.bytes.experts_total == file.total_bytes == mixtral.mix.nbytes(spec)
    counts = tuple(tuple(range(8)) for _ in spec.layers)
    add_usage(file.folder, RoutedTokens(counts, (14,) * len(counts)))
    assert plan_load("tiny", spec, options, [CPU], Bandwidths(), file).request.use == counts
    add_usage(
        tmp_path / "f", RoutedTokens(counts[1:], (14,) * (len(counts) - 1))
    )  # of another model: replaces
    assert plan_load("tiny", spec, options, [CPU], Bandwidths(), file).request.use is None
    assert ExpertFile.open(file.folder).mix == mixtral.mix
