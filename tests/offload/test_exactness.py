"""Offloading never changes the result: a loaded model against transformers' own on the same checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_local
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.spec import experts_modules
from moe_local.offload.dense.linear import QuantizedLinear
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.native.library import library
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import footprint
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.footprint import expert_bytes
from moe_local.offload.plan.plan import Request
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec
from support import fake_device
from support.variants import others_slow

torch.set_num_threads(1)

EXACT = {"experts": "fp32", "dense": "fp32"}
POLICIES = ("lru", "lfu", "fifo")
PREFETCH = ("off", "router")
NEW = 8
"""Tokens to generate."""
CPU = torch.device("cpu")


class Reference:
    """transformers' model of a checkpoint, and prompts with the greedy ids that it gives them."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        generator = torch.Generator().manual_seed(1)
        self.single = torch.randint(3, 320, (1, 11), generator=generator)
        self.batch = torch.randint(3, 320, (3, 9), generator=generator)
        self.mask = torch.ones_like(self.batch)
        for row, pad in ((0, 4), (2, 1)):
            self.batch[row, :pad] = self.hf.config.pad_token_id or 0
            self.mask[row, :pad] = 0
        self.long = torch.randint(3, 320, (1, 3000), generator=generator)
        self.expected = {
            "single": self.ids(self.single),
            "batch": self.ids(self.batch, attention_mask=self.mask),
        }

    def ids(self, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        """Greedy ids; no end token, so that every sequence runs its length."""
        options = {"max_new_tokens": NEW, "eos_token_id": None, **options}
        with torch.inference_mode():
            found: torch.Tensor = self.hf.generate(prompt, **options)
        return found

    def check(self, model: moe_local.Model) -> None:
        """Greedy ids of single and batched prompts are the same, and the bookkeeping holds."""
        options = {"max_new_tokens": NEW, "eos_token_id": None}
        assert torch.equal(model.generate(self.single, **options), self.expected["single"])
        given = model.generate(self.batch, attention_mask=self.mask, **options)
        assert torch.equal(given, self.expected["batch"])
        stream = model.stream(self.single[0].tolist(), **options)
        assert [token.id for token in stream] == self.expected["single"][0, self.single.shape[1] :].tolist()
        model.check_integrity()

    def check_logits(self, model: moe_local.Model) -> None:
        """Logits of both prompts, and greedy ids, are those of the weights that `hf` has by now."""
        for prompt in (self.single, self.batch):
            with torch.inference_mode():
                expected = self.hf(prompt).logits
                found = model.hf(prompt).logits
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        ids = model.generate(self.single, max_new_tokens=NEW, eos_token_id=None)
        assert torch.equal(ids, self.ids(self.single))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def reference(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Reference:
    return Reference(make_checkpoint(request.param, tokenizer=True))


@pytest.fixture(scope="module")
def mixtral_reference(tiny_mixtral: Path) -> Reference:
    return Reference(tiny_mixtral)


@pytest.mark.parametrize(
    ("slots", "policy", "prefetch"),
    [
        (2, "lru", "off"),
        (2, "lfu", "router"),
        (3, "lru", "router"),
        (3, "fifo", "off"),
        (4, "fifo", "router"),
        (8, "lru", "router"),
    ],
)
def test_greedy_ids_are_those_of_transformers(
    reference: Reference, slots: int, policy: str, prefetch: str
) -> None:
    with moe_local.load(
        reference.folder, slots=slots, policy=policy, prefetch=prefetch, context=64, **EXACT
    ) as model:
        reference.check(model)
        stats = model.stats()
        if slots < 8:
            assert model.plan.mode == "disk"
            assert stats.misses > 0
            assert stats.evictions > 0
            assert stats.bytes.disk > 0
            assert (stats.prefetch.issued > 0) == (prefetch == "router")
        else:
            assert model.plan.mode == "resident"
            assert stats.misses == stats.evictions == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "policy", "prefetch"), list(itertools.product((2, 3, 4, 5, 7, 8), POLICIES, PREFETCH))
)
def test_greedy_ids_over_the_whole_product(
    reference: Reference, slots: int, policy: str, prefetch: str
) -> None:
    with moe_local.load(
        reference.folder, slots=slots, policy=policy, prefetch=prefetch, context=64, **EXACT
    ) as model:
        reference.check(model)


def test_padding_is_guessed_from_the_pad_token(mixtral_reference: Reference) -> None:
    expected = mixtral_reference.ids(mixtral_reference.batch)
    with moe_local.load(mixtral_reference.folder, slots=3, context=64, **EXACT) as model:
        ids = model.generate(mixtral_reference.batch, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(ids, expected)


def test_prompt_of_thousands_of_tokens(reference: Reference) -> None:
    """Longer than a chunk, and with more experts than slots in every layer of it: several waves."""
    expected = reference.ids(reference.long, max_new_tokens=6)
    with moe_local.load(reference.folder, slots=2, context=3072, **EXACT) as model:
        assert model.plan.chunk < 3000
        ids = model.generate(reference.long, max_new_tokens=6, eos_token_id=None)
        assert torch.equal(ids, expected)
        model.check_integrity()


# --- through a device of its own memory


def load_on_device(
    folder: Path,
    device: Any,
    *,
    vram_slots: int,
    ram_slots: int,
    prefetch: str,
    policy: str = "lru",
    miss: str = "fetch",
) -> moe_local.Model:
    """As `load` on a card: `vram_slots` experts a layer there, `ram_slots` in RAM, the rest on disk."""
    checkpoint = Checkpoint.open(folder)
    options = LoadOptions(slots=vram_slots, prefetch=prefetch, policy=policy, context=64, miss=miss, **EXACT)
    plan = plan_request(
        Request(
            model=checkpoint.name,
            spec=checkpoint.spec,
            ram=ram_slots * sum(expert_bytes(checkpoint.spec, "fp32")),
            vram=2**30,
            experts="fp32",
            dense="fp32",
            context=64,
            slots=vram_slots,
        )
    ).check()
    return assemble(checkpoint, open_experts(checkpoint, "fp32"), plan, options, CPU, device)


@pytest.mark.parametrize(
    ("vram_slots", "ram_slots", "mode"),
    others_slow(
        [(2, 2, "disk"), (3, 5, "disk"), (2, 8, "offload"), (4, 3, "disk"), (8, 2, "resident")],
        [(3, 5, "disk"), (2, 8, "offload")],
    ),
)
def test_vram_over_ram_over_disk(reference: Reference, vram_slots: int, ram_slots: int, mode: str) -> None:
    """Copies end in any order, and as late as they may."""
    seed = 100 * vram_slots + ram_slots
    device = fake_device.FakeDevice(seed=seed, luck=0.2)
    with load_on_device(
        reference.folder, device, vram_slots=vram_slots, ram_slots=ram_slots, prefetch="router"
    ) as model:
        assert model.plan.mode == mode
        reference.check(model)
        stats = model.stats()
        assert stats.bytes.h2d == device.copies * model.plan.bytes.expert
        assert (stats.misses > 0) == (mode != "resident")
        if mode == "offload":  # RAM holds all of them: read once, at load
            assert stats.bytes.disk == model.plan.bytes.experts_total


@pytest.mark.parametrize("miss", ["auto", "cpu"])
@pytest.mark.parametrize(("vram_slots", "ram_slots", "mode"), [(3, 8, "offload"), (2, 4, "disk")])
def test_misses_computed_by_the_cpu(
    mixtral_reference: Reference, vram_slots: int, ram_slots: int, mode: str, miss: str
) -> None:
    """With a device whose kernels are the CPU's, nothing shows who computed what."""
    with load_on_device(
        mixtral_reference.folder,
        fake_device.FakeDevice(seed=vram_slots, luck=0.2),
        vram_slots=vram_slots,
        ram_slots=ram_slots,
        prefetch="router",
        miss=miss,
    ) as model:
        assert model.plan.mode == mode
        mixtral_reference.check(model)
        stats = model.stats()
        assert stats.misses > 0
        if miss == "cpu" and mode == "offload":  # only promotions and prefetches were copied
            assert stats.bytes.h2d < stats.misses * model.plan.bytes.expert


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_vram_over_ram_over_disk_in_many_orders(mixtral_reference: Reference, seed: int) -> None:
    vram_slots, ram_slots = 2 + seed % 3, 2 + seed % 5
    device = fake_device.FakeDevice(seed=seed, luck=(0.02, 0.2, 0.9)[seed % 3])
    with load_on_device(
        mixtral_reference.folder,
        device,
        vram_slots=vram_slots,
        ram_slots=ram_slots,
        prefetch=PREFETCH[seed // 12],
        policy=POLICIES[seed % 3],
    ) as model:
        mixtral_reference.check(model)


# --- other dtypes


@pytest.fixture(scope="module")
def published(mixtral_19: Path) -> Reference:
    """The published layout: 19 bf16 shards, an expert's matrices each a tensor of its own."""
    return Reference(mixtral_19, torch.bfloat16)


def test_published_layout_in_fp32(mixtral_19: Path) -> None:
    with moe_local.load(mixtral_19, slots=3, context=64, **EXACT) as model:
        Reference(mixtral_19, torch.float32).check(model)


def test_bf16_logits_are_as_good_as_transformers(published: Reference) -> None:
    """bf16 experts in the checkpoint's own dtype, against the same weights computed in fp32. Both round, in
    other places, and where that sends a token to other experts a logit is far off; of the tokens' errors the
    median tells."""
    exact_model = AutoModelForCausalLM.from_pretrained(published.folder, dtype=torch.float32).eval()
    with moe_local.load(published.folder, slots=3, context=64, experts="bf16") as model:
        assert model.hf.dtype == torch.bfloat16
        ours = theirs = 0.0
        for prompt in (published.single, published.long[:, :64], published.long[:, 64:128]):
            with torch.inference_mode():
                exact = exact_model(prompt).logits
                theirs += float((published.hf(prompt).logits.float() - exact).norm(dim=-1).median())
                ours += float((model.hf(prompt).logits.float() - exact).norm(dim=-1).median())
        assert 0 < ours <= 1.1 * theirs


def test_bf16_results_do_not_depend_on_the_cache(published: Reference) -> None:
    found = []
    for slots, prefetch in ((2, "router"), (3, "off"), (8, "off")):
        with moe_local.load(
            published.folder, slots=slots, prefetch=prefetch, context=64, experts="bf16"
        ) as model:
            found.append(model.generate(published.batch, attention_mask=published.mask, max_new_tokens=NEW))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def replace_by_nf4(hf: Any) -> None:
    """Each expert's weights as bitsandbytes quantizes and dequantizes them, double-quantized scales.

    As one row: bitsandbytes 0.50.2 misplaces scales on AVX512 CPUs in rows of no whole number of blocks.
    """
    for _, module in experts_modules(hf):
        for _, parameter in module.named_parameters(recurse=False):
            for expert in range(parameter.shape[0]):
                packed, state = bitsandbytes.functional.quantize_4bit(
                    parameter.data[expert].reshape(1, -1),
                    blocksize=64,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                weights = bitsandbytes.functional.dequantize_4bit(packed, state)
                parameter.data[expert] = weights.view(parameter.shape[1:])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_nf4_logits_are_those_of_bitsandbytes_weights(
    make_checkpoint: Callable[..., Path], model_type: str
) -> None:
    folder = make_checkpoint(model_type, tokenizer=True)
    reference = Reference(folder)
    replace_by_nf4(reference.hf)
    with moe_local.load(folder, slots=3, context=64, experts="nf4", dense="fp32") as model:
        reference.check_logits(model)


# --- transformers' own ways of calling


def test_plain_calls_and_beams_of_the_transformers_model(reference: Reference) -> None:
    with moe_local.load(reference.folder, slots=2, context=64, **EXACT) as model:
        with torch.inference_mode():
            expected = reference.hf(reference.batch, attention_mask=reference.mask).logits
            found = model.hf(reference.batch, attention_mask=reference.mask).logits
        # positions of padding mean nothing
        visible = reference.mask.bool()
        torch.testing.assert_close(found[visible], expected[visible], rtol=1e-4, atol=1e-4)
        beams = {"num_beams": 3, "max_new_tokens": 10, "eos_token_id": None, "do_sample": False}
        expected_ids = reference.ids(reference.batch, attention_mask=reference.mask, **beams)
        through_hf = model.hf.generate(reference.batch, attention_mask=reference.mask, **beams)
        through_model = model.generate(reference.batch, attention_mask=reference.mask, **beams)
        assert torch.equal(through_hf, expected_ids)
        assert torch.equal(through_model, expected_ids)
        model.check_integrity()


def test_sampling_is_repeatable_and_that_of_transformers(mixtral_reference: Reference) -> None:
    """`seed` seeds a generator of the sequence's own; without it torch's global one decides, as ever."""
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40}
    options = {**sampling, "max_new_tokens": NEW, "eos_token_id": None}
    prompt = mixtral_reference.single
    with moe_local.load(mixtral_reference.folder, slots=3, context=64, **EXACT) as model:
        torch.manual_seed(7)
        expected = mixtral_reference.ids(prompt, **sampling)
        torch.manual_seed(7)
        assert torch.equal(model.generate(prompt, **options), expected)
        once, again = (model.generate(prompt, seed=7, **options) for _ in range(2))
        assert torch.equal(once, expected)
        assert torch.equal(again, expected)
        assert not torch.equal(model.generate(prompt, seed=8, **options), expected)
        text = model.generate(prompt[0].tolist(), seed=7, **options)
        assert text.token_ids == expected[0, prompt.shape[1] :].tolist()


# --- the quantized dense part


def replace_by_decoded(hf: Any, quantized: Any, dense: str) -> None:
    """Give `hf` the weights that the quantized linear layers of another model stand for."""
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            decoded = codec_for(dense).decode(module.weight, module.layout, torch.float32)
            hf.get_submodule(name).weight.data.copy_(decoded["weight"])


def replace_experts_by_int8(hf: Any) -> None:
    codec = codec_for("int8")
    for _, module in experts_modules(hf):
        for _, parameter in module.named_parameters(recurse=False):
            layout = codec.layout([TensorSpec("w", tuple(parameter.shape[1:]))])
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
            for expert in range(parameter.shape[0]):
                codec.encode({"w": parameter.data[expert]}, layout, buffer)
                parameter.data[expert] = codec.decode(buffer, layout, torch.float32)["w"]


@pytest.mark.parametrize("dense", ["nf4", "int8"])
def test_logits_are_those_of_the_decoded_weights(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dense: str
) -> None:
    """Of a Qwen2-MoE, which has shared experts and biases, all through the loop in fp32."""
    monkeypatch.setattr(footprint, "compute_dtype", lambda spec, dense: torch.float32)
    folder = make_checkpoint("qwen2_moe", tokenizer=True)
    reference = Reference(folder)
    replace_experts_by_int8(reference.hf)
    with moe_local.load(folder, slots=3, context=64, experts="int8", dense=dense) as model:
        assert model.hf.dtype == torch.float32
        replace_by_decoded(reference.hf, model.hf, dense)
        reference.check_logits(model)
        through_hf = model.hf.generate(reference.single, max_new_tokens=NEW, eos_token_id=None)
        assert torch.equal(through_hf, reference.ids(reference.single))
        expected_logits = model.hf(reference.single).logits
    with moe_local.load(
        folder, slots=3, context=64, experts="int8", dense=dense, activations="int8"
    ) as model:
        rounded = model.hf(reference.single).logits
    error = float((rounded - expected_logits).norm() / expected_logits.norm())
    assert error < 0.1
    assert error > 1e-4 or library() is None
