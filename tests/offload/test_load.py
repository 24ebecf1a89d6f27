"""load() and convert(): what is planned is what is allocated, and a load that fails leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import synthetic
import torch

import moe_local
from moe_local.cache.errors import CheckpointError, DoesNotFitError, OptionError, TransferError
from moe_local.offload.checkpoint import checkpoint as checkpoint_module
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.plan import Request
from moe_local.offload.prefetch.auto import AutoPrefetcher
from moe_local.offload.prefetch.prefetch import NoPrefetch
from moe_local.offload.prefetch.router_prefetcher import RouterPrefetcher
from moe_local.offload.schedule import calibrate
from moe_local.offload.schedule.costs import Costs
from moe_local.offload.tiers import device as device_module
from support import fake_device

torch.set_num_threads(1)

EXACT = {"experts": "fp32", "dense": "fp32"}
GIB = 2**30


# --- the promise about memory


def dense_bytes(hf: Any) -> int:
    """Parameters and buffers, and what bitsandbytes keeps beside quantized parameters; tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*hf.parameters(), *hf.buffers())}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for parameter in hf.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code]
            if state.nested:  # on some CPUs bitsandbytes undoes it in the first forward
                parts += [state.state2.absmax, state.state2.code, state.offset]
            total += sum(part.numel() * part.element_size() for part in parts)
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return total


def check_bytes(model: moe_local.Model, tolerance: float = 0.02) -> None:
    """Dense part, KV and arenas take what the plan said; a KiB a quantized matrix (code tables) aside."""
    plan, parts = model.plan, model._open()
    quantized = sum(hasattr(parameter, "quant_state") for parameter in model.hf.parameters())
    assert dense_bytes(model.hf) == pytest.approx(plan.bytes.dense, rel=tolerance, abs=1100 * quantized)
    assert parts.engine.kv.nbytes == pytest.approx(plan.bytes.kv, rel=tolerance)
    arenas = {"ram": parts.store.tier.arena.nbytes, "vram": 0}
    if parts.store.below is not None:
        arenas = {"ram": parts.store.below.arena.nbytes, "vram": parts.store.tier.arena.nbytes}
    fixed = (
        {"vram": plan.bytes.fixed, "ram": 0} if plan.request.vram else {"vram": 0, "ram": plan.bytes.fixed}
    )
    for tier, used in plan.used().items():
        assert arenas[tier] == used - fixed[tier]


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [
        ("mixtral", "fp32"),
        ("mixtral", "bf16"),
        ("mixtral", "nf4"),
        ("mixtral", "int8"),
        ("qwen3_moe", "auto"),
        ("qwen2_moe", "bf16"),
        ("gpt_oss", "fp32"),
        ("deepseek_v3", "fp32"),
    ],
)
def test_planned_bytes_are_allocated_bytes(
    make_checkpoint: Callable[..., Path], model_type: str, dense: str
) -> None:
    folder = make_checkpoint(model_type, vocab_size=1000)
    with moe_local.load(folder, slots=3, dense=dense, context=512) as model:
        check_bytes(model)
        assert len(model.generate([5, 6, 7], max_new_tokens=2, eos_token_id=None).token_ids) == 2
        assert not any(
            parameter.numel() for module in model.hf.modules() if isinstance(module, OffloadedExperts)
            for parameter in module.parameters()
        )  # fmt: skip


def test_planned_bytes_with_a_device(tiny_mixtral: Path) -> None:
    checkpoint = Checkpoint.open(tiny_mixtral)
    request = Request(
        model="tiny", spec=checkpoint.spec, ram=GIB, vram=GIB, slots=3, context=256, experts="bf16"
    )
    plan = plan_request(request).check()
    options = LoadOptions(slots=3, context=256, experts="bf16")
    file = open_experts(checkpoint, "bf16")
    with assemble(checkpoint, file, plan, options, torch.device("cpu"), fake_device.FakeDevice()) as model:
        check_bytes(model)


@pytest.mark.parametrize(("miss", "experts"), [("auto", "nf4"), ("cpu", "bf16"), ("fetch", "nf4")])
def test_the_cpu_is_measured_where_it_may_have_to_compute(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch, miss: str, experts: str
) -> None:
    measured: dict[int, float] = {}
    monkeypatch.setattr(Costs, "set_cpu", lambda self, work, seconds: measured.update({work.tokens: seconds}))
    looks = count()  # at a clock which goes on by a second at each
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: float(next(looks))))
    checkpoint = Checkpoint.open(tiny_mixtral)
    request = Request(
        model="tiny", spec=checkpoint.spec, ram=GIB, vram=GIB, slots=3, context=256, experts=experts
    )
    plan = plan_request(request).check()
    options = LoadOptions(slots=3, context=256, experts=experts, miss=miss)
    file = open_experts(checkpoint, experts)
    device = fake_device.FakeDevice()
    with assemble(checkpoint, file, plan, options, torch.device("cpu"), device) as model:
        assert plan.mode == "offload"
        assert (model._open().store.host is not None) == (miss != "fetch")
        assert measured == ({} if miss == "fetch" else {1: 1.0, 4: 1.0, 16: 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["auto", "nf4"])
def test_planned_bytes_above_a_gibibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: str) -> None:
    """And the whole process stays within its budget, with less RAM than the experts take."""
    folder = tmp_path / "model"
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))  # gigabytes that go with the test
    shape = synthetic.Shape(hidden=2048, intermediate=7168, layers=4, heads=16, kv_heads=8)
    synthetic.mixtral_19_shards(folder, shape)
    moe_local.load(folder, slots=2, experts="bf16", dense=dense, context=256).close()
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    with moe_local.load(
        folder, ram="2.2GiB", experts="bf16", dense=dense, context=16384, prefetch="off"
    ) as model:
        assert model.plan.mode == "disk"
        assert model.plan.bytes.experts_total > 2.2 * GIB
        assert model.plan.used()["ram"] > GIB
        check_bytes(model)
        model.generate(torch.arange(5, 1500)[None], max_new_tokens=8, eos_token_id=None)
        assert process.memory_info().rss - before < 2.2 * GIB


def test_conversion_holds_a_few_experts_only(make_checkpoint: Callable[..., Path], one_thread: None) -> None:
    """Peak memory while 72 MiB of experts are converted, over what this process has anyway."""
    folder = make_checkpoint(
        "mixtral",
        dtype=torch.bfloat16,
        shards=5,
        hidden_size=512,
        intermediate_size=1024,
    )

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    checkpoint = Checkpoint.open(folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the conversion would use again, unseen
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    experts = open_experts(checkpoint, "bf16").total_bytes
    peak = memory("VmHWM") - before
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert experts >= 72 * 2**20
    assert 0 < peak < shard + 4 * experts // 24


# --- options


@pytest.mark.parametrize(
    ("options", "mode", "prefetcher"),
    [
        ({"slots": 3}, "disk", AutoPrefetcher),
        ({"slots": 3, "prefetch": "off"}, "disk", NoPrefetch),
        ({"slots": 3, "prefetch": "router"}, "disk", RouterPrefetcher),
        ({"slots": 8}, "resident", NoPrefetch),
        ({}, "resident", NoPrefetch),
        ({"ram": "1GiB"}, "resident", NoPrefetch),
        ({"ram": "2300KiB", "context": 64}, "disk", AutoPrefetcher),
        ({"slots": 100}, "resident", NoPrefetch),
        ({"slots": 2, "miss": "cpu", "policy": "lfu", "device": "cpu"}, "disk", AutoPrefetcher),
    ],
)
def test_options_reach_their_places(
    tiny_mixtral: Path, options: dict[str, Any], mode: str, prefetcher: type
) -> None:
    with moe_local.load(tiny_mixtral, experts="fp32", **options) as model:
        assert model.plan.mode == mode
        assert type(model._open().prefetcher) is prefetcher
        assert model.plan.used()["ram"] <= model.plan.request.ram
        assert model.hf.dtype == torch.float32
        assert model.name == tiny_mixtral.name or model.name == str(tiny_mixtral)
        assert len(model.generate("hello", max_new_tokens=3, eos_token_id=None).token_ids) == 3


def test_resident_experts_are_never_missed(tiny_mixtral: Path) -> None:
    with moe_local.load(tiny_mixtral, context=64) as model:
        out = model.generate("hello", max_new_tokens=8)
        assert out.stats.misses == out.stats.counts.evictions == out.stats.counts.bytes.disk == 0
        assert out.stats.stall_s == 0
        assert out.stats.hits > 0


def test_progress_is_told(tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    moe_local.load(tiny_mixtral, progress=lambda *args: told.append(args)).close()
    converting = [args[1:] for args in told if args[0] == "converting"]
    loading = [args[1:] for args in told if args[0] == "loading"]
    assert converting == [(done, 24) for done in range(1, 25)]
    assert loading[-1] == (24, 24)
    assert loading == sorted(loading)
    told.clear()
    moe_local.load(tiny_mixtral, slots=2, progress=lambda *args: told.append(args)).close()
    assert told == []  # converted before, and nothing to bring


def test_what_is_on_this_machine_is_read_once(tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is parsed, and its shape found out, by the checkpoint alone."""
    read: list[Path] = []
    parse = checkpoint_module.parse_config

    def counting(path: Path) -> Any:
        read.append(path)
        return parse(path)

    monkeypatch.setattr(checkpoint_module, "parse_config", counting)
    with moe_local.load(tiny_mixtral, device="cpu"):
        pass
    assert read == [tiny_mixtral / "config.json"]


def test_convert_writes_where_it_is_told(tiny_mixtral: Path, tmp_path: Path) -> None:
    out = moe_local.convert(tiny_mixtral, tmp_path / "here", "bf16")
    assert out == tmp_path / "here"
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json"}
    at_home = moe_local.convert(tiny_mixtral, experts="bf16")
    assert [path.read_bytes() for path in sorted(out.glob("*.safetensors"))] == [
        path.read_bytes() for path in sorted(at_home.glob("*.safetensors"))
    ]
    with pytest.raises(OptionError, match="unknown experts 'int3'"):
        moe_local.convert(tiny_mixtral, experts="int3")


def test_refusal_comes_in_the_words_of_fit_before_anything_is_written(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    with pytest.raises(DoesNotFitError) as caught:
        moe_local.load(tiny_mixtral, ram="1MiB")
    plan = moe_local.fit(tiny_mixtral, ram="1MiB", device="cpu")
    assert str(caught.value) == f"{plan.reason}; {plan.nearest} fits"
    assert caught.value.exit_code == 3
    assert not (tmp_path / "home").exists()
    # and what it names does fit
    flags = re.findall(r"--(\w+) (\S+)", plan.nearest or "")
    settings = {name: int(value) if value.isdigit() else value for name, value in flags}
    moe_local.load(tiny_mixtral, **{"ram": "1MiB", **settings}).close()


# --- loads that fail half-way


def left_over() -> tuple[set[str], set[str]]:
    """Our threads, and open files of experts."""
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("moe-local")}
    return threads, {file.path for file in psutil.Process().open_files() if "layer-" in file.path}


@pytest.fixture
def copy(tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny Mixtral to damage, with an empty home of its own."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny_mixtral, tmp_path / "copy"))


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5000, 2)
        byte = file.read(1)[0]
        file.seek(-5000, 2)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_expert_stops_a_load_that_brings_all(copy: Path) -> None:
    folder = moe_local.convert(copy)
    flip_a_byte(folder / "layer-00001.safetensors")
    before = left_over()
    with pytest.raises(TransferError, match="wrong checksum") as caught:
        moe_local.load(copy)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    gc.collect()
    assert left_over() == before
    moe_local.convert(copy, check=True)
    moe_local.load(copy).close()


def test_a_damaged_expert_ends_an_answer_and_nothing_else(copy: Path) -> None:
    with moe_local.load(copy, slots=2, context=512, **EXACT) as model:
        expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None)
    folder = moe_local.convert(copy, experts="fp32")
    flip_a_byte(folder / "layer-00001.safetensors")
    with moe_local.load(copy, slots=2, context=512, **EXACT) as model:
        with pytest.raises(TransferError, match="wrong checksum"):
            model.generate(list(range(3, 300)), max_new_tokens=4)  # meets every expert
        model.check_integrity()
        moe_local.convert(copy, experts="fp32", check=True)
    with moe_local.load(copy, slots=2, context=512, **EXACT) as model:
        found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None)
    assert torch.equal(found, expected)


def test_a_damaged_tokenizer_stops_a_load(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{]")
    before = left_over()
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded") as caught:
        moe_local.load(copy)
    assert "\n" not in str(caught.value)
    gc.collect()
    assert left_over() == before


def test_memory_that_the_system_refuses(tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = left_over()
    monkeypatch.setattr(device_module, "page_mapping", refuse)
    with pytest.raises(DoesNotFitError, match=r"the system refused .* of memory for expert slots") as caught:
        moe_local.load(tiny_mixtral)
    assert caught.value.exit_code == 3
    assert left_over() == before


def test_memory_that_a_device_refuses(tiny_mixtral: Path) -> None:
    class Full(fake_device.FakeDevice):  # type: ignore[name-defined, misc]
        def allocate(self, nbytes: int) -> torch.Tensor:
            raise DoesNotFitError("cuda:0 refused 1 GiB for expert slots")

    checkpoint = Checkpoint.open(tiny_mixtral)
    plan = plan_request(Request(model="tiny", spec=checkpoint.spec, ram=GIB, vram=GIB, slots=2, context=64))
    file = open_experts(checkpoint, "nf4")
    before = left_over()
    with pytest.raises(DoesNotFitError, match="cuda:0 refused"):
        assemble(checkpoint, file, plan, LoadOptions(slots=2), torch.device("cpu"), Full())
    assert left_over() == before


def test_ctrl_c_in_a_load(tiny_mixtral: Path) -> None:
    before = left_over()

    def press(what: str, done: int, total: int) -> None:
        if what == "loading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moe_local.load(tiny_mixtral, progress=press)
    gc.collect()
    assert left_over() == before
    moe_local.load(tiny_mixtral).close()
