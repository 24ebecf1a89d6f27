"""What only a CUDA device can show. Run with `python -m pytest -m gpu`; nothing here needs the network."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.dense.fused_norm import use_fused_norms
from moe_local.offload.engine.graphs import CudaGraphs
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.gpu import relief
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.grouped import GroupedExperts, GroupedRun, GroupedStep
from moe_local.offload.kernels.grouped_trial import made_expert
from moe_local.offload.kernels.launcher import Launcher
from moe_local.offload.kernels.layer import LayerKernels, OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.plan.free_memory import free_vram
from moe_local.offload.quantize import nf4_blocks
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.tiers import device_arena
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device import CudaDevice, HostMemory
from moe_local.offload.tiers.device_arena import DeviceArena
from support import random_experts, tiny_models
from support.expert_codecs import expert_codec
from support.expert_math import GptOss, Lease, Math

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOE_LOCAL_DEVICE_MISSES", "off")  # test_device_misses.py has it on
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_ids_do_not_depend_on_cache_or_prefetch(
    make_checkpoint: Callable[..., Path], model_type: str
) -> None:
    folder = make_checkpoint(model_type)
    ids = torch.randint(3, tiny_models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    reference = tiny_models.tiny_model(model_type)
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
    )
    for slots in (2, 3, 8):
        for prefetch in ("off", "router"):
            with moe_local.load(
                folder,
                device="cuda",
                slots=slots,
                prefetch=prefetch,
                miss="fetch",
                experts="fp32",
                dense="fp32",
            ) as model:
                mask = torch.ones_like(ids)
                got = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
                assert torch.equal(got.cpu(), expected), (slots, prefetch)
                model.check_integrity()


@pytest.mark.parametrize("miss", ["auto", "cpu"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_cpu_computes_misses_within_rounding(
    make_checkpoint: Callable[..., Path], miss: str, tokens: int
) -> None:
    """fp32 on both sides: the logits differ by the order of sums, 1e-4 of the largest at most."""
    folder = make_checkpoint("mixtral")
    ids = torch.randint(3, tiny_models.VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))
    logits = []
    for how in ("fetch", miss):
        with (
            moe_local.load(folder, device="cuda", slots=2, miss=how, experts="nf4", dense="fp32") as model,
            torch.inference_mode(),
        ):
            for _ in range(4):
                found = model.hf(ids.cuda()).logits.float().cpu()
            logits.append(found)
            stats = model.stats()
            assert stats.misses > 0
            if how == "cpu":
                assert stats.stall.cpu > 0
            model.check_integrity()
    assert (logits[1] - logits[0]).abs().max() < 1e-4 * logits[0].abs().max()


def test_int8_experts_give_the_ids_of_the_cpu(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("mixtral")
    found = []
    for device in ("cpu", "cuda"):
        with moe_local.load(folder, device=device, slots=3, experts="int8", dense="fp32") as model:
            found.append(model.generate(list(range(3, 40)), max_new_tokens=24, do_sample=False).token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("dense", ["nf4", "int8"])
def test_the_dense_part_is_quantized_as_planned(make_checkpoint: Callable[..., Path], dense: str) -> None:
    folder = make_checkpoint("qwen2_moe")
    with moe_local.load(folder, device="cuda", slots=3, dense=dense) as model:
        kinds = ("Linear4bit", "Linear8bitLt")
        found = {
            f"{name}.weight" for name, module in model.hf.named_modules() if type(module).__name__ in kinds
        }
        assert found == model.plan.request.spec.quantizable
        assert len(model.generate([5, 6, 7], max_new_tokens=4, eos_token_id=None).token_ids) == 4


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_nf4_agrees_with_the_reference(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    specs = (TensorSpec("gate_up_proj", (2 * 768, 512)), TensorSpec("down_proj", (512, 768)))
    weights = {spec.name: 0.05 * torch.randn(spec.shape, generator=generator) for spec in specs}
    codec = codec_for("nf4")
    layout = codec.layout(specs)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    codec.encode(weights, layout, buffer)
    x = torch.randn(tokens, 512, generator=generator)
    slow = ExpertKernels().forward(Math(), x, buffer, layout)
    fast = ExpertKernels().forward(Math(), x.to("cuda", dtype), buffer.cuda(), layout).float().cpu()
    assert (fast - slow).norm() / slow.norm() < (0.02 if dtype is torch.bfloat16 else 0.005)


def leased(math: Math, count: int, d: int, f: int, format: str = "nf4") -> list[Lease]:
    """Experts in slots of one arena on the GPU, last first."""
    specs = [TensorSpec("gate_up_proj", (2 * f, d)), TensorSpec("down_proj", (d, f))]
    if math.has_bias:
        specs += [TensorSpec(f"{spec.name}_bias", spec.shape[:1]) for spec in tuple(specs)]
    codec = expert_codec(format)
    layout = codec.layout(specs)
    arena = torch.empty(count, layout.nbytes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(d + f)
    for expert in range(count):
        weights = {spec.name: 0.05 * torch.randn(spec.shape, generator=generator) for spec in specs}
        codec.encode(weights, layout, arena[count - 1 - expert])
    on_gpu = arena.cuda()
    return [Lease(expert, on_gpu[count - 1 - expert], layout) for expert in range(count)]


def in_groups(step: Any, leases: list[Lease], groups: list[list[int]]) -> torch.Tensor:
    for group in groups:
        step.compute([leases[expert] for expert in group])
    result: torch.Tensor = step.result()
    return result


GROUPED = {
    "swiglu": (Math(), 512, 768, "nf4"),
    "gpt-oss": (GptOss(has_bias=True), 320, 448, "nf4"),
    "wide": (Math(), 4096, 64, "nf4"),
    "nvfp4": (GptOss(has_bias=True), 320, 448, "nvfp4"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("math", "d", "f", "format"), GROUPED.values(), ids=GROUPED)
def test_grouped_kernels_agree_with_one_by_one(
    math: Math, d: int, f: int, format: str, dtype: torch.dtype
) -> None:
    """And are no further from fp32 than it; their bits are the same in every group."""
    pytest.importorskip("triton")
    experts = 12
    leases = leased(math, experts, d, f, format)
    kernels, each = LayerKernels(), ExpertKernels()
    for tokens, top_k in ((1, 1), (1, 8), (2, 3), (8, 4), (30, 3)):
        generator = torch.Generator().manual_seed(tokens)
        weights, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
        x, weights = torch.randn(tokens, d, generator=generator).to("cuda", dtype), weights.to("cuda", dtype)
        routing = Routing(ids.flatten().tolist(), tokens, experts)
        used = routing.experts
        single = in_groups(OneByOne(each, math, x, routing, weights), leases, [used])
        exact = in_groups(OneByOne(each, math, x.float(), routing, weights.float()), leases, [used])
        results = []
        for groups in ([used], [used[::-1]], [[expert] for expert in used], [used[:1], used[1:] or used[:1]]):
            step = kernels.begin(math, x, routing, weights, leases[0].layout)
            assert isinstance(step, GroupedStep)
            results.append(in_groups(step, leases, groups))
        assert results[0].dtype == dtype
        bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        assert (results[0] - single).float().norm() / single.float().norm() < bound
        ours, theirs = ((y.float() - exact).norm() for y in (results[0], single))
        assert ours <= theirs + 1e-3 * exact.norm()
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("format", "d", "f"),
    [("nf4", 2880, 2880), ("mxfp4", 2048, 768), ("nvfp4", 2048, 768), ("q3", 4096, 128)],
)
def test_levels_that_are_shuffled_are_those_that_are_loaded(format: str, d: int, f: int) -> None:
    """Bit by bit, where a row is several steps, or one that is not full."""
    pytest.importorskip("triton")
    card = torch.device("cuda", torch.cuda.current_device())
    specs = [TensorSpec("gate_up_proj", (2 * f, d)), TensorSpec("down_proj", (d, f))]
    layout, experts, found = expert_codec(format).layout(specs), GroupedExperts(), []
    base, x = made_expert(layout).to(card), torch.randn(8, d, device=card).bfloat16()
    for shuffles in (True, False):
        assert experts.shuffles(card, layout) == shuffles
        launcher = experts.launcher(Math(), card, layout)
        assert launcher is not None
        for tokens in (1, 8):
            run = GroupedRun(launcher, x[:tokens], torch.ones(tokens, 1, device=card))
            run.launch(base, torch.tensor([[0, *range(tokens)]], device=card))
            found.append(run.outputs)
        experts.stop_shuffling(card, layout)
    assert all(each.isfinite().all() for each in found)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shifted", [False, True])
def test_norms_are_a_kernel_of_torchs_or_three(shifted: bool, dtype: torch.dtype) -> None:
    """With the original's numbers. Those that round once as it does are off where its sum is another."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

    for width in (128, 2880, 7168):
        plain = (GemmaRMSNorm if shifted else MixtralRMSNorm)(width, 1e-5).to("cuda", dtype)
        plain.requires_grad_(False).weight.add_(0.3 * torch.randn(width, device="cuda"))
        model = torch.nn.ModuleList([copy.deepcopy(plain)])
        use_fused_norms(model)
        assert "_norm_kind" in vars(model[0])
        x = torch.randn(1, 1, width, device="cuda").to(dtype)
        with torch.inference_mode(), torch.profiler.profile() as profile:
            model[0](x)
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        most = 1 if not shifted else 2 if dtype is torch.float32 else 3
        assert len([name for name in kernels if "Memcpy" not in name]) <= most, kernels
        x = torch.randn(300, width, device="cuda").to(dtype)
        with torch.inference_mode():
            got, want = model[0](x).float(), plain(x).float()
        step = torch.finfo(dtype).eps * (16 if dtype is torch.float32 else 2)
        assert ((got - want).abs() <= step * want.abs() + 1e-6).all()
        if shifted and dtype is not torch.float32:
            assert (got != want).float().mean() < 5e-3


def test_kernels_that_are_wrong_are_done_without(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    folder, prompt = make_checkpoint("qwen3_moe"), list(range(3, 40))
    with moe_local.load(folder, device="cuda", slots=8, miss="fetch", dense="fp32") as model:
        want = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
    assert "one by one" not in caplog.text
    up = Launcher.up

    def wrong(self: Launcher, base: Any, stride: int, table: Any, planes: Any, *rest: Any) -> None:
        up(self, base, stride, table, 2 * planes, *rest)

    monkeypatch.setattr(Launcher, "up", wrong)
    with moe_local.load(folder, device="cuda", slots=8, miss="fetch", dense="fp32") as model:
        got = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
    assert "computed one by one on cuda" in caplog.text
    assert got == want


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_grouped_step_never_waits_for_the_gpu(tokens: int) -> None:
    """Nor does one in which an expert has more tokens than the grouped kernels take."""
    pytest.importorskip("triton")
    math, leases, kernels = Math(), leased(Math(), 8, 256, 256), LayerKernels()
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    weights = torch.rand(tokens, 4, device="cuda").bfloat16()
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            routing = Routing([5, 0, 3, 6] * tokens, tokens, 8)
            step = kernels.begin(math, x, routing, weights, leases[0].layout)
            assert isinstance(step, GroupedStep)
            result = in_groups(step, leases, [[5, 0], [3, 6]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite().all()


def test_a_table_is_not_overwritten_while_a_step_before_still_needs_it() -> None:
    """Hundreds of steps in a row, no wait between: their tables come from few pinned blocks."""
    pytest.importorskip("triton")
    math, leases, kernels = Math(), leased(Math(), 8, 256, 256), LayerKernels()
    x, weights = torch.randn(1, 256, device="cuda"), torch.rand(1, 2, device="cuda")
    pairs = [[n % 8, (n + 1 + n // 8 % 7) % 8] for n in range(56)]

    def run(pair: list[int]) -> torch.Tensor:
        routing = Routing(pair, 1, 8)
        return in_groups(kernels.begin(math, x, routing, weights, leases[0].layout), leases, [pair])

    alone = []
    for pair in pairs:
        alone.append(run(pair))
        torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # a backlog: the host runs far ahead
    in_a_row = [run(pair) for pair in 4 * pairs]
    assert all(torch.equal(got, alone[i % len(pairs)]) for i, got in enumerate(in_a_row))


def test_nf4_ids_do_not_depend_on_the_cache(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    launches, launch = [], Launcher.up

    def counted(self: Launcher, *arguments: Any) -> None:
        launches.append(arguments)
        launch(self, *arguments)

    monkeypatch.setattr(Launcher, "up", counted)
    found = []
    for slots, prefetch in ((2, "off"), (3, "router"), (8, "off")):
        with moe_local.load(
            make_checkpoint("qwen3_moe"), device="cuda", slots=slots, prefetch=prefetch
        ) as model:
            out = model.generate(list(range(3, 40)), max_new_tokens=48, do_sample=False, eos_token_id=None)
            found.append(out.token_ids)
            model.check_integrity()
    assert found[0] == found[1] == found[2]
    assert launches


FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3"]


def decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, graphs: str, **options: Any
) -> tuple[list[int], Any, Any]:
    """Greedy ids over a change of columns, with the statistics and the engine's TokenStep."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", graphs)
    with moe_local.load(folder, device="cuda", **options) as model:
        assert model.stats().hits == model.stats().misses == 0
        prompt = list(range(3, 40))
        out = model.generate(prompt, max_new_tokens=280, do_sample=False, eos_token_id=None)
        model.check_integrity()
        step = model.parts.engine.token_step
        return out.token_ids, model.stats(), step


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ids_are_the_same_with_and_without_graphs(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """In fp32, where masked attention over a static row tips no token; whatever is cached and prefetched."""
    folder = make_checkpoint(model_type)
    exact = {"experts": "fp32", "dense": "fp32", "miss": "fetch", "context": 512}
    want, counts, _ = decoded(folder, monkeypatch, "off", slots=2, prefetch="router", **exact)
    for slots, prefetch in ((2, "router"), (3, "off"), (8, "off")):
        ids, stats, step = decoded(folder, monkeypatch, "on", slots=slots, prefetch=prefetch, **exact)
        assert ids == want, (slots, prefetch)
        assert step is not None
        assert step.failure is None
        assert len(step.captured) == 2  # 256 and 384 columns
        assert stats.routed == counts.routed
        if (slots, prefetch) == (2, "router"):
            assert stats.prefetch.issued == counts.prefetch.issued > 0


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_log_probabilities_of_replayed_tokens_are_the_models_own(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    """Of the prompt and of tokens that a graph computes, whose logits the next token overwrites."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", graphs)
    exact = {"experts": "fp32", "dense": "fp32", "miss": "fetch", "context": 512}
    with moe_local.load(make_checkpoint("qwen3_moe"), device="cuda", slots=8, **exact) as model:
        engine = model.parts.engine
        ids = list(range(3, 40))
        options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
        settings = make_settings(model.hf, ids, logprobs=3, **options)
        settings.prompt_logprobs = True
        sequence = engine.join(ids, settings)
        steps: list[Any] = []
        while sequence.finish_reason is None:
            steps += engine.step()
        with torch.inference_mode():
            logits = model.hf(input_ids=torch.tensor([sequence.ids[:-1]], device="cuda")).logits[0]
        want = torch.log_softmax(logits.float(), dim=-1).cpu()
        told = [*sequence.prompt_logprobs, *(step.logprobs for step in steps)]
        assert len(told) == len(ids) - 1 + 6
        for place, (token, one) in enumerate(zip(sequence.ids[1:], told, strict=True)):
            assert one.logprob == pytest.approx(float(want[place, token]), abs=1e-3)
            values = [value for _, value in one.top_logprobs]
            assert values == pytest.approx(want[place].topk(3).values.tolist(), abs=1e-3)
        assert [step.logprobs.top_logprobs[0][0] for step in steps] == [step.token for step in steps]
        engine.leave(sequence)


@pytest.mark.parametrize("dense", ["bf16", "nf4"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_resident_step_is_one_graph(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str, dense: str
) -> None:
    """NF4 experts, all in slots: the same ids as with two slots a layer, and as computed without replays."""
    pytest.importorskip("triton")
    folder = make_checkpoint(model_type, **({} if model_type == "qwen3_moe" else {"intermediate_size": 128}))
    options = {"experts": "nf4", "dense": dense, "miss": "fetch", "context": 512, "prefetch": "off"}
    ids, stats, step = decoded(folder, monkeypatch, "on", slots=8, **options)
    assert step is not None
    assert [captured.segments for captured in step.captured.values()] == [1, 1]
    assert stats.misses == 0
    assert stats.hits > 0
    few, counts, step = decoded(folder, monkeypatch, "on", slots=2, **options)
    assert few == ids
    assert counts.routed == stats.routed
    assert step is not None
    assert all(captured.segments > 1 for captured in step.captured.values())


def test_a_resident_token_waits_for_nothing_but_its_id(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    for graphs in ("on", "off"):
        monkeypatch.setenv("MOE_LOCAL_GRAPHS", graphs)
        with moe_local.load(make_checkpoint("qwen3_moe"), device="cuda", slots=8, context=512) as model:
            engine = model._open().engine
            ids = list(range(3, 40))
            settings = make_settings(model.hf, ids, max_new_tokens=99, eos_token_id=None, do_sample=False)
            sequence = engine.join(ids, settings)
            for _ in range(8):
                engine.step()
            waits: list[str] = []
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    engine.step()
                waits = [str(warning.message) for warning in caught if "sync" in str(warning.message)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(waits) <= 3, waits  # the id, and the two numbers that a plain forward is given
            engine.leave(sequence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(768, 512), (7, 100), (3, 5), (1, 64)])
def test_nf4_encoded_on_the_gpu_has_the_same_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(shape, generator=generator)
    weights.view(-1)[:: max(1, weights.numel() // 7)] = torch.tensor(1e-38)
    tensors = {"w": weights.to(dtype), "b": torch.randn(9, generator=generator).to(dtype)}
    codec = codec_for("nf4")
    layout = codec.layout([TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    buffers = [torch.empty(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    codec.encode(tensors, layout, buffers[0])
    codec.encode({name: tensor.cuda() for name, tensor in tensors.items()}, layout, buffers[1])
    assert torch.equal(*buffers)


def test_weights_on_the_bounds_are_quantized_alike_on_the_gpu() -> None:
    """Midpoints of levels and their neighbours in blocks of many scales: where the last bit decides."""
    bounds = torch.tensor(nf4_blocks._bounds())
    low, high = (torch.nextafter(bounds, torch.tensor(to)) for to in (-2.0, 2.0))
    row = torch.cat([torch.tensor([1.0]), bounds, low, high, torch.zeros(18)])
    weights = row * torch.tensor([1.0, -1.0, 0.37, -3e-5, 1e30, 3e38, 1e-37, 1e-39, 1e-44]).unsqueeze(1)
    parts = {}
    for device in ("cpu", "cuda"):
        q = torch.empty(weights.numel() // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(len(weights), device=device)
        nf4_blocks.quantize_blocks(weights.to(device), q, absmax)
        parts[device] = q.cpu(), absmax.cpu()
    assert all(torch.equal(one, other) for one, other in zip(parts["cpu"], parts["cuda"], strict=True))


def test_a_file_is_the_same_wherever_it_is_encoded(tmp_path: Path) -> None:
    source = random_experts.RandomExperts(layers=2, experts=6)  # enough for both places and the faster one
    for name, gpu in (("cpu", None), ("gpu", torch.device("cuda"))):
        convert_experts(source, codec_for("nf4"), tmp_path / name, gpu=gpu)
    for path in (tmp_path / "cpu").iterdir():
        assert path.read_bytes() == (tmp_path / "gpu" / path.name).read_bytes()


def test_host_arena_is_pinned_and_exact() -> None:
    arena = HostArena([3, 5], [4096 * 7, 4096 * 300], pin=True)
    assert arena.memory.pinned_bytes == arena.memory.nbytes == 3 * 4096 * 7 + 5 * 4096 * 300
    assert arena.buffer(1, 4).is_pinned()
    arena.close()


def test_copies_wait_for_readers_and_readers_for_copies() -> None:
    """One device slot is filled and summed in turn from many host slots, with no host sync in between."""
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    size, rounds = 1 << 24, 32
    host = HostArena([8], [size], pin=True)
    for slot in range(8):
        host.buffer(0, slot).fill_(slot + 1)
    target = device.allocate(size)
    sums, waits, reader = [], [], None
    for number in range(rounds):
        waits.append(device.wait(device.copy(target, host.buffer(0, number % 8), reader)))
        sums.append(target.sum(dtype=torch.int64))
        reader = device.record()
    assert [int(total) for total in sums] == [size * (number % 8 + 1) for number in range(rounds)]
    assert all(waited.seconds() >= 0 for waited in waits)
    host.close()


def test_steady_state_allocates_nothing(make_checkpoint: Callable[..., Path]) -> None:
    with moe_local.load(make_checkpoint("mixtral"), device="cuda", slots=2) as model:
        prompt = list(range(3, 40))
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            model.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None)
        assert torch.cuda.memory_allocated() <= before + 4096


def test_close_gives_the_memory_back(make_checkpoint: Callable[..., Path]) -> None:
    before = allocated()
    model = moe_local.load(make_checkpoint("mixtral"), device="cuda", slots=4)
    model.generate([3, 4, 5], max_new_tokens=4)
    assert torch.cuda.memory_allocated() > before
    model.close()
    del model
    assert allocated() <= before + 4096


def test_the_driver_gets_slots_back_and_what_is_cached_counts_as_free() -> None:
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    free = free_vram(device.torch_device, reserve=False)
    arena = DeviceArena([8], [50_000_000], device)
    full = torch.cuda.mem_get_info()[0]
    assert free - full >= arena.nbytes
    nbytes = arena.nbytes
    arena.close()
    assert torch.cuda.mem_get_info()[0] - full >= nbytes
    torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info()[0] < free - nbytes // 2
    assert free_vram(device.torch_device, reserve=False) >= free


def allocated() -> int:
    """Bytes in use, without the workspaces that torch keeps for every stream."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_a_refusal_to_pin_leaves_the_rest_usable_and_cuda_well(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA itself refuses: a range that is pinned already cannot be pinned again."""
    mib = 1 << 20
    memory = HostMemory(80 * mib)
    taken = memory.tensor.data_ptr() + 60 * mib  # behind the 32 MiB that are timed
    assert int(torch.cuda.cudart().cudaHostRegister(taken, mib, 0)) == 0
    memory.pin([0, 16 * mib, 32 * mib, 64 * mib, 80 * mib])
    assert memory.pinned_bytes == 16 * mib  # and the second range is given back for others
    assert "GB/s" in caplog.records[0].getMessage()
    torch.cuda.cudart().cudaHostUnregister(taken)
    assert float(torch.ones(5, device="cuda").sum()) == 5  # would raise an error that was left over
    memory.tensor[:] = torch.arange(80 * mib) % 251
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    target = device.allocate(80 * mib)
    for part in (slice(0, 16 * mib), slice(16 * mib, None)):  # no copy may cross a cut
        device.copy(target[part], memory.tensor[part], None).synchronize()
    assert torch.equal(target.cpu(), memory.tensor)
    memory.close()


def test_segments_that_are_given_back_reach_the_driver() -> None:
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    device.trim()
    before = torch.cuda.mem_get_info()[0]
    arena = DeviceArena([8] * 4, [50_000_000] * 4, device, least=[2] * 4)
    full = torch.cuda.mem_get_info()[0]
    assert before - full >= arena.nbytes
    freed = 0
    while arena.next_to_go(device) is not None:
        freed += arena.give_back(device)
    device.trim()
    assert arena.slots == (2, 2, 2, 2)
    assert torch.cuda.mem_get_info()[0] - full >= freed
    arena.close()


def all_that_is_free() -> list[torch.Tensor]:
    """Tensors that leave no room on the card for another one."""
    hog, size = [], 1 << 36
    while size >= 1 << 20:
        try:
            hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return hog


def test_experts_give_way_when_vram_runs_out(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another tensor takes all that is free; a long prompt then needs what the experts have."""
    monkeypatch.setattr(relief, "MARGIN", 16 << 20)
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 12 << 20)
    folder = make_checkpoint(
        "mixtral", dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=5
    )
    prompt = [3 + i % 300 for i in range(1500)]
    with moe_local.load(folder, device="cuda", experts="bf16", miss="fetch") as model:
        assert model.plan.mode == "resident"
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
        torch.cuda.empty_cache()
        hog = all_that_is_free()
        other = [7, *prompt]  # nothing of it is in the key-value memory
        model.generate(other, max_new_tokens=2)
        assert "VRAM ran out on cuda" in caplog.text
        assert sum(model.plan.vram_slots) < 40
        found = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
        del hog
        assert found == expected
        model.check_integrity()


def test_experts_give_way_to_graphs(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program takes all that is free at the last moment before a capture."""
    monkeypatch.setattr(relief, "MARGIN", 16 << 20)
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 12 << 20)
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    folder = make_checkpoint(
        "mixtral", dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=5
    )
    hog: list[torch.Tensor] = []
    with moe_local.load(folder, device="cuda", experts="bf16", miss="fetch", slots=7) as model:
        expected = model.generate([5, 6, 7], max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
        step = model.parts.engine.token_step
        assert step is not None
        assert step.captured
        step.captured.clear()  # and with them the pool
        make_room = CudaGraphs.make_room

        def robbed(self: CudaGraphs) -> None:
            make_room(self)
            hog.extend(all_that_is_free() if not hog else [])

        monkeypatch.setattr(CudaGraphs, "make_room", robbed)
        found = model.generate([5, 6, 7], max_new_tokens=8, do_sample=False, eos_token_id=None).token_ids
        assert found == expected
        assert hog
        assert "VRAM ran out on cuda" in caplog.text
        assert "without CUDA graphs" not in caplog.text
        assert step.failure is None
        assert step.captured
        hog.clear()
        model.check_integrity()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_two_cards_give_the_ids_of_one(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The prompt through a ring on both, tokens from graphs of both: were anything that is read or captured
    another card's memory, the ids would differ."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    folder, found = make_checkpoint(model_type), []
    for device, vram in (("cuda:0", "2GiB"), ("cuda", "2x2GiB")):
        with moe_local.load(
            folder, device=device, vram=vram, slots=3, experts="fp32", dense="fp32", miss="fetch"
        ) as model:
            assert len(model.plan.cards) == (0 if device == "cuda:0" else 2)
            assert model.plan.vram_staging >= 2
            out = model.generate(list(range(3, 60)), max_new_tokens=32, do_sample=False, eos_token_id=None)
            found.append(out.token_ids)
            model.check_integrity()
            devices = {str(parameter.device) for parameter in model.hf.parameters()}
            assert len(devices) == (1 if device == "cuda:0" else 2)
            step = model.parts.engine.token_step
            assert step is not None
            assert step.captures
            segments = {captured.segments for captured in step.captured.values()}
            moe_layers = len(model.plan.vram_slots)
            assert min(segments) == moe_layers + (1 if device == "cuda:0" else 3)
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_experts_that_all_lie_on_two_cards_are_captured_with_the_rest(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three graphs a token: the first card's, the second's, and what becomes of the logits on the first."""
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    folder, found = make_checkpoint("qwen3_moe"), []
    options: dict[str, Any] = {"slots": 8, "experts": "nf4", "dense": "bf16", "context": 512}
    lacking = moe_local.fit(folder, vram=[1 << 16] * 2, **options).shortfall_bytes
    for device, vram in (("cuda:0", "2GiB"), ("cuda", [lacking + (1 << 17)] * 2)):
        with moe_local.load(folder, device=device, vram=vram, miss="fetch", **options) as model:  # type: ignore[arg-type]
            assert len(model.plan.cards) == (0 if device == "cuda:0" else 2)
            assert model.plan.mode == "resident"
            out = model.generate(list(range(3, 60)), max_new_tokens=32, do_sample=False, eos_token_id=None)
            found.append(out.token_ids)
            assert model.stats().misses == 0
            step = model.parts.engine.token_step
            assert step is not None
            segments = {captured.segments for captured in step.captured.values()}
            assert segments == {1 if device == "cuda:0" else 3}
            model.check_integrity()
    assert found[0] == found[1]


def test_copies_behind_a_slower_link() -> None:
    """Right bytes, in the time that the limit gives them or a little more."""
    from moe_local.offload.tiers.slow_link import SlowLink

    device = SlowLink(torch.device("cuda", torch.cuda.current_device()), 2e9)
    source = torch.randint(0, 256, (100_000_000,), dtype=torch.uint8).pin_memory()
    destination = device.allocate(source.numel())
    copied = device.copy(destination, source, None)
    copied.synchronize()
    assert torch.equal(destination.cpu(), source)
    assert 0.04 < copied.seconds() < 0.07


def test_a_spoiled_capture_leaves_torch_well() -> None:
    """And a capture begun after all graphs are gone has a pool again.

    The allocator of pinned memory, which has not heard of the end, finds the graph that it asks.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    capture, x = CudaGraphs(device), torch.ones(4, device=device)
    with capture.session():
        capture.begin()
        assert capture._capturing is not None
        spoiled = weakref.ref(capture._capturing)
        with pytest.raises(RuntimeError):
            x.sum().item()
        capture.abort()
    gc.collect()
    assert spoiled() is not None
    torch.cuda.empty_cache()
    assert 0 <= float(torch.rand(1, device=device)) < 1
    for _ in range(2):
        with capture.session():
            capture.begin()
            y = x * 3
            graph = capture.end()
        graph.replay()
        assert y.tolist() == [3.0] * 4
        del graph, y
    torch.cuda.empty_cache()
