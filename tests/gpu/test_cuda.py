"""What only a CUDA device can show. Run with `python -m pytest -m gpu`; nothing here needs the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moe_local
from moe_local.offload.kernels.expert import expert_forward
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.device import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.empty_cache()


class SwiGLU:
    has_gate, has_bias = True, False

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return output


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_ids_do_not_depend_on_cache_or_prefetch(
    make_checkpoint: Callable[..., Path], tiny_models: ModuleType, model_type: str
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
                folder, device="cuda", slots=slots, prefetch=prefetch, experts="fp32", dense="fp32"
            ) as model:
                mask = torch.ones_like(ids)
                got = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
                assert torch.equal(got.cpu(), expected), (slots, prefetch)
                model.check_integrity()


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
    slow = expert_forward(SwiGLU(), x, buffer, layout)
    fast = expert_forward(SwiGLU(), x.to("cuda", dtype), buffer.cuda(), layout).float().cpu()
    assert (fast - slow).norm() / slow.norm() < (0.02 if dtype is torch.bfloat16 else 0.005)


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
    sums, reader = [], None
    for number in range(rounds):
        waited = device.wait(device.copy(target, host.buffer(0, number % 8), reader))
        sums.append(target.sum(dtype=torch.int64))
        reader = device.record()
        assert waited.seconds() >= 0
    assert [int(total) for total in sums] == [size * (number % 8 + 1) for number in range(rounds)]
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
    before = torch.cuda.memory_allocated()
    model = moe_local.load(make_checkpoint("mixtral"), device="cuda", slots=4)
    model.generate([3, 4, 5], max_new_tokens=4)
    assert torch.cuda.memory_allocated() > before
    model.close()
    del model
    assert torch.cuda.memory_allocated() <= before + 4096
