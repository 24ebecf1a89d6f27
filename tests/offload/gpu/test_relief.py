"""Memory that runs out in a step: what gives way, what is said, and that the answer stays the same."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.cache.errors import DoesNotFitError, MoeLocalError
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.gpu import relief
from moe_local.offload.gpu.relief import Shortage, shortage
from moe_local.offload.kernels import cpu
from moe_local.offload.kernels.cpu import CpuExperts
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.plan import Request
from moe_local.offload.tiers import device_arena
from support import tiny_models

torch.set_num_threads(1)
GIB = 2**30
PROMPT = list(range(3, 90))
TEXT = (
    "CUDA out of memory. Tried to allocate 4.00 KiB. GPU 0 has a total capacity of 23.64 GiB of which "
    "1.2 GiB is free. Process 1 has 9 GiB memory in use."
)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.getbasetemp() / "relief-home"))
    monkeypatch.setattr(device_arena, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(relief, "MARGIN", 0)


class Hungry:
    """Makes a module's forwards run out of memory, as often as it is told, holding memory of its own."""

    def __init__(self, module: torch.nn.Module, tokens: int | None = None) -> None:
        """`tokens`: with no more than so many tokens a forward always succeeds."""
        self.left = 0
        self.raised = 0
        self.tokens = tokens
        self.held: list[torch.Tensor] = []
        self.hook = module.register_forward_pre_hook(self._run, with_kwargs=True)

    def _run(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        workspace = torch.empty(1000)
        if self.left and (self.tokens is None or hidden.shape[1] > self.tokens):
            self.left -= 1
            self.raised += 1
            raise torch.OutOfMemoryError(TEXT)
        del workspace


@contextmanager
def hungry(hf: Any, **options: Any) -> Iterator[Hungry]:
    found = Hungry(hf.model.layers[-1], **options)
    try:
        yield found
    finally:
        found.hook.remove()


class Made:
    """What a tiny Mixtral with a fake device is assembled from."""

    def __init__(self, folder: Path, slots: int, context: int = 256) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.options = LoadOptions(slots=slots, context=context, experts="fp32", miss="fetch")
        request = Request(
            model="tiny",
            spec=self.checkpoint.spec,
            ram=GIB,
            vram=GIB,
            slots=slots,
            context=context,
            experts="fp32",
        )
        self.plan = plan_request(request).check()
        self.file = open_experts(self.checkpoint, "fp32")

    def model(self, device: Any) -> moe_local.Model:
        return assemble(self.checkpoint, self.file, self.plan, self.options, torch.device("cpu"), device)


def ids(model: moe_local.Model, prompt: list[int] = PROMPT) -> list[int]:
    out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    model.check_integrity()
    return out.token_ids


def strides(model: moe_local.Model) -> list[int]:
    """Bytes of a slot of each layer."""
    arena = model._open().store.tier.arena
    return [arena.buffer(layer, 0).numel() for layer in range(3)]


# What an error says


def test_what_lacked_is_read_from_the_error() -> None:
    assert shortage(torch.OutOfMemoryError(TEXT)) == Shortage(4096, 0)
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has"
    assert shortage(torch.OutOfMemoryError(text)) == Shortage(5 * GIB // 2, 1)
    assert shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes.")) == (512, None)
    assert shortage(torch.OutOfMemoryError("whatever")) == Shortage(0, None)
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert shortage(RuntimeError(cublas)) == Shortage(0, None)
    assert shortage(RuntimeError("Triton Error [CUDA]: out of memory")) == Shortage(0, None)


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"]
)
@pytest.mark.parametrize(("free", "reserved", "lacks"), [(1 << 20, 1, True), (GIB, 1, False), (0, 0, False)])
def test_what_may_mean_two_things_is_a_lack_of_vram_where_a_card_is_full(
    monkeypatch: pytest.MonkeyPatch, text: str, free: int, reserved: int, lacks: bool
) -> None:
    """A kernel's code finds no room when it is loaded. A card that is not used is not asked."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: reserved * card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: [(GIB, GIB), (free, GIB)][card])
    assert shortage(RuntimeError(text)) == (Shortage(0, None) if lacks else None)


def test_other_errors_are_no_lack_of_vram() -> None:
    """Above all not a refusal to pin RAM, which CUDA calls out of memory, too."""
    for error in (
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError("out of memory"),
        DoesNotFitError("cuda:0 refused 1 GiB"),
        KeyboardInterrupt(),
    ):
        assert shortage(error) is None


# The engine alone


def test_a_step_runs_again_once_something_gave_way() -> None:
    hf = tiny_models.tiny_model("mixtral", num_hidden_layers=2)
    for kv in (make_kv(hf, 2, 64), OwnCaches(hf.config, 2, 64)):
        engine = Engine(hf, kv, chunk=6)
        asked: list[Shortage] = []
        engine.relief = lambda lacking, asked=asked: asked.append(lacking) or True
        prompts = [list(range(5, 19)), list(range(30, 37))]
        settings = make_settings(hf, [1], max_new_tokens=6, eos_token_id=None)
        alone = []
        for prompt in prompts:
            sequence = engine.join(prompt, settings)
            while sequence.finish_reason is None:
                engine.step()
            engine.leave(sequence)
            engine.forget()
            alone.append(sequence.new_ids)
        sequences = [engine.join(prompt, settings) for prompt in prompts]
        with hungry(hf) as memory:
            for count in range(60):  # whoever has a cache of its own begins anew each time
                memory.left = 2 if count % 10 == 4 else 0
                engine.step()
                engine.check_integrity()
            assert memory.raised == len(asked) >= 2
        assert set(asked) == {Shortage(4096, 0)}
        assert [sequence.new_ids for sequence in sequences] == alone
        assert engine.chunk == 6


def test_the_failed_forward_is_gone_when_something_has_to_give_way() -> None:
    """An exception keeps its trace, the trace the frames, and the frames all that the forward allocated."""
    hf = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    engine = Engine(hf, make_kv(hf, 1, 64), chunk=6)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    hook = hf.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(weakref.ref(args[0])), with_kwargs=True
    )
    engine.relief = lambda lacking: alive.append(seen[-1]() is not None) or True
    engine.join([5, 6, 7], make_settings(hf, [1], max_new_tokens=2))
    with hungry(hf) as memory:
        memory.left = 1
        engine.step()
    hook.remove()
    assert alive == [False]


def test_chunks_get_shorter_where_nothing_can_give_way(caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    prompt = [3 + i % 300 for i in range(700)]
    expected = None
    for limit in (None, 100):
        engine = Engine(hf, make_kv(hf, 1, 800), chunk=512)
        sequence = engine.join(prompt, make_settings(hf, [1], max_new_tokens=4, eos_token_id=None))
        with hungry(hf, tokens=limit) as memory:
            memory.left = 0 if limit is None else 100
            while sequence.finish_reason is None:
                engine.step()
                engine.check_integrity()
        expected = expected or sequence.new_ids
        assert sequence.new_ids == expected
        assert engine.chunk == (512 if limit is None else 64)
        assert memory.raised == (0 if limit is None else 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"VRAM ran out: prompts go in chunks of {n} tokens from now on" for n in (256, 128, 64)
    ]


def test_chunks_stay_where_a_prompt_goes_in_one_piece() -> None:
    hf = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    kv = OwnCaches(hf.config, 1, 800)
    kv.whole_prompt_only = True
    engine = Engine(hf, kv, chunk=512)
    engine.join(list(range(5, 305)), make_settings(hf, [1], max_new_tokens=4, eos_token_id=None))
    with hungry(hf) as memory:
        memory.left = 100
        with pytest.raises(MoeLocalError, match="VRAM ran out"):
            engine.step()
    assert memory.raised == 1
    assert engine.chunk == 512


def test_when_nothing_is_left_one_line_says_what_to_do() -> None:
    hf = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    engine = Engine(hf, make_kv(hf, 1, 64), chunk=64)
    engine.relief = lambda lacking: False
    sequence = engine.join(list(range(5, 50)), make_settings(hf, [1], max_new_tokens=3, eos_token_id=None))
    with hungry(hf) as memory:
        memory.left = 100
        with pytest.raises(MoeLocalError, match=r"VRAM ran out \(4.00 KiB more") as caught:
            engine.step()
    assert "\n" not in str(caught.value)
    assert "close other programs" in str(caught.value)
    engine.check_integrity()
    while sequence.finish_reason is None:
        engine.step()
    assert len(sequence.new_ids) == 3


# A whole model on a fake device


@pytest.mark.parametrize("slots", [6, 8])
def test_experts_give_way_and_the_ids_stay_the_same(
    tiny_mixtral: Path, make_device: Callable[..., Any], caplog: pytest.LogCaptureFixture, slots: int
) -> None:
    made, device = Made(tiny_mixtral, slots), make_device()
    with made.model(make_device()) as model:
        expected = ids(model)
    with made.model(device) as model:
        stride = strides(model)[0]
        resident = slots == 8
        assert model.plan.mode == ("resident" if resident else "offload")
        with hungry(model.hf) as memory, caplog.at_level(logging.WARNING):
            for left in (slots - 1, slots - 2):
                memory.left = 3  # one slot of each of the three layers
                assert ids(model) == expected
                assert model.plan.vram_slots == (left,) * 3
                assert device.allocated == (3 * left + model.plan.vram_staging) * stride
            assert memory.raised == len(caplog.records) == 6
            memory.left = 1000
            with pytest.raises(MoeLocalError, match="no expert is left that could give way"):
                ids(model)
            memory.left = 0
        assert model.plan.vram_slots == (2, 2, 2)
        assert model.plan.mode == ("disk" if resident else "offload")
        assert ids(model) == expected
        stats = model.stats()
        assert stats.misses > 0
        assert stats.evictions >= 6
    message = caplog.records[0].getMessage()
    assert f"kept {slots - 1} to {slots} of {slots} experts a layer" in message
    assert "\n" not in message
    assert device.allocated == 0


def test_memory_comes_back_that_was_computed_from_one_by_one(
    tiny_mixtral: Path, make_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of a slot that kernels keep for the next time must not keep its segment."""
    monkeypatch.setattr(CpuExperts, "serves", lambda *args: False)
    monkeypatch.setattr(cpu, "serves", lambda *args: False)
    made, device = Made(tiny_mixtral, 5), make_device()
    with made.model(device) as model:
        expected, stride = ids(model), strides(model)[0]
        with hungry(model.hf) as memory:
            memory.left = 3
            assert ids(model) == expected
        assert model.plan.vram_slots == (4, 4, 4)
        assert device.allocated == (3 * 4 + model.plan.vram_staging) * stride
    assert device.allocated == 0


def test_a_stream_goes_on_over_a_shortage(tiny_mixtral: Path, make_device: Callable[..., Any]) -> None:
    made = Made(tiny_mixtral, 5)
    with made.model(make_device()) as model:
        expected = ids(model)
        found = []
        with hungry(model.hf) as memory:
            for token in model.stream(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None):
                found.append(token.id)
                memory.left = 1 if len(found) in (3, 7) else 0
            assert memory.raised == 2
        assert found == expected
        model.check_integrity()


def test_memory_that_runs_out_between_two_groups_of_experts(
    tiny_mixtral: Path, make_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a lease is out, and others of the layer are on their way."""
    made = Made(tiny_mixtral, 4)
    with made.model(make_device()) as model:
        expected = ids(model)
    left, groups = [0], []
    begin = LayerKernels.begin

    def counted(self: LayerKernels, *args: Any, **kwargs: Any) -> Any:
        step = begin(self, *args, **kwargs)
        compute = step.compute

        def run(group: Any) -> None:
            compute(group)
            groups.append(len(group))
            if left[0] and len(groups) % 7 == 3:
                left[0] -= 1
                raise torch.OutOfMemoryError(TEXT)

        step.compute = run
        return step

    monkeypatch.setattr(LayerKernels, "begin", counted)
    with made.model(make_device()) as model:
        left[0] = 5
        assert ids(model) == expected
        assert left == [0]
        assert sum(model.plan.vram_slots) == 12 - 5


def test_transformers_own_generate_is_told_to_call_again(
    tiny_mixtral: Path, make_device: Callable[..., Any]
) -> None:
    made = Made(tiny_mixtral, 5)
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with made.model(make_device()) as model:
        prompt = torch.tensor([PROMPT])
        expected = model.generate(prompt, **beams)
        with hungry(model.hf) as memory:
            memory.left = 1
            with pytest.raises(MoeLocalError, match="call it again"):
                model.generate(prompt, **beams)
        assert model.plan.vram_slots == (5, 5, 4)
        assert torch.equal(model.generate(prompt, **beams), expected)
        model.check_integrity()


def test_a_load_that_is_refused_half_way_goes_on_with_fewer(
    tiny_mixtral: Path, make_device: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    made = Made(tiny_mixtral, 8)
    with made.model(make_device()) as model:
        expected = ids(model)
        stride = strides(model)[0]
    spare = 2 * stride
    made.plan = replace(made.plan, bytes=replace(made.plan.bytes, workspace=spare))
    device = make_device(capacity=13 * stride + spare + stride // 2)
    with made.model(device) as model:
        assert model.plan.vram_slots == (5, 4, 4)
        assert device.allocated <= device.capacity - spare
        assert (model.plan.mode, model.plan.ram_slots) == ("offload", (8, 8, 8))
        assert ids(model) == expected
        assert model.stats().misses > 0
    assert "room for 13 of the 24 experts" in caplog.records[0].getMessage()
    for room in (0, 6, 7):
        device = make_device(capacity=room * stride)
        with pytest.raises(DoesNotFitError, match="refused"):
            made.model(device)
        assert device.allocated == 0


def test_a_load_that_is_refused_half_way_leaves_the_workspace_its_memory_beside_the_ring(
    tiny_mixtral: Path, make_device: Callable[..., Any]
) -> None:
    made = Made(tiny_mixtral, 5)
    with made.model(make_device()) as model:
        expected, stride, ring = ids(model), strides(model)[0], model.plan.vram_staging
        assert ring == 2
    spare = 3 * stride
    made.plan = replace(made.plan, bytes=replace(made.plan.bytes, workspace=spare))
    least = 3 * made.checkpoint.spec.top_k
    for room in range(least, 3 * 5 - 3):  # slots that can be had beside the workspace
        device = make_device(capacity=room * stride + spare)
        with made.model(device) as model:
            has_ring = room - ring >= least
            assert model.plan.vram_staging == (ring if has_ring else 0)
            assert sum(model.plan.vram_slots) == (room - ring if has_ring else room)
            assert device.allocated == room * stride
            assert ids(model) == expected
    with pytest.raises(DoesNotFitError, match="refused"):
        made.model(make_device(capacity=(least - 1) * stride + spare))


def test_a_dense_part_that_does_not_fit_is_one_line(
    tiny_mixtral: Path, make_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tiny_mixtral, 8)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError(TEXT + "\nSee documentation")

    monkeypatch.setattr("moe_local.offload.load.load_skeleton", refuse)
    with pytest.raises(
        DoesNotFitError, match="less memory free than was planned with: CUDA out of"
    ) as caught:
        made.model(make_device())
    assert "\n" not in str(caught.value)
