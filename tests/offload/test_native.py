"""experts="native": the checkpoint's own bytes in the slots, and nothing written anywhere."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_local
from moe_local.cache.errors import CheckpointError, OptionError, TransferError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.native.library import library
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.footprint import expert_bytes
from moe_local.offload.plan.plan import Request
from moe_local.offload.quantize.codec import codec_for, decoder_for
from moe_local.offload.quantize.layout import ALIGNMENT
from moe_local.offload.tiers.location import FileRange, ScatteredLocation
from moe_local.offload.tiers.transfer import DEMAND, FileSource, LoadState
from support import fake_device

torch.set_num_threads(1)

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 320, (1, 11), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def stored(
    make_checkpoint: Callable[..., Path], publish: Callable[..., tuple[Path, Path]]
) -> Callable[[str, str], tuple[Path, Path]]:
    """stored("mixtral", "fp8") -> a folder with experts in this format, and one that transformers reads."""

    def stored(model_type: str, format: str) -> tuple[Path, Path]:
        if format in ("fp8", "mxfp4"):
            return publish(model_type)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[format]
        folder = make_checkpoint(model_type, dtype=dtype, shards=3)
        return folder, folder

    return stored


EVERYWHERE = [
    ("mixtral", "fp32", "fp32"),
    ("mixtral", "bf16", "bf16"),
    ("granitemoe", "fp16", "fp16"),
    ("gpt_oss", "bf16", "plain"),
    ("qwen3_moe", "fp8", "fp8"),
    ("mixtral", "fp8", "fp8"),
    ("gpt_oss", "mxfp4", "mxfp4"),
]
"""Model, format of its experts, and what layouts call it."""


@pytest.mark.parametrize(("model_type", "format", "name"), EVERYWHERE)
def test_every_expert_is_decoded_from_its_own_bytes(
    stored: Callable[..., tuple[Path, Path]], home: Path, model_type: str, format: str, name: str
) -> None:
    """To the bits that conversion would have started from, out of a buffer that held others before."""
    checkpoint = Checkpoint.open(stored(model_type, format)[0])
    experts = NativeExperts(checkpoint, home / "none")
    assert experts.formats == [name]
    assert tuple(experts.layout(i, 0).nbytes for i in range(3)) == expert_bytes(checkpoint.spec, "native")
    for layer in checkpoint.spec.layers:
        for expert in range(layer.num_experts):
            layout = experts.layout(layer.index, expert)
            assert layout is experts.layout(layer.index, 0)
            assert all(segment.offset % ALIGNMENT == 0 for segment in layout.segments)
            buffer = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8)
            location = experts.locate(ExpertKey(layer.index, expert))
            for path, offset, nbytes, at in location.ranges:
                with open(path, "rb") as file:
                    file.seek(offset)
                    buffer[at : at + nbytes] = torch.frombuffer(
                        bytearray(file.read(nbytes)), dtype=torch.uint8
                    )
            assert location.nbytes == sum(segment.nbytes for segment in layout.segments)
            decoded = decoder_for(layout.format).decode(buffer, layout, torch.float32)
            for tensor, weight in checkpoint.read_expert(layer, expert).items():
                assert torch.equal(decoded[tensor], weight.float()), (layer.name, expert, tensor)
    if name in ("fp32", "bf16", "fp16"):
        assert layout == codec_for(name).layout(layer.tensors)  # so that every kernel of that format reads it


@pytest.mark.parametrize(
    ("model_type", "format"),
    [("mixtral", "fp32"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4"), ("gpt_oss", "bf16")],
)
def test_greedy_ids_are_those_of_transformers(
    stored: Callable[..., tuple[Path, Path]],
    home: Path,
    caplog: pytest.LogCaptureFixture,
    model_type: str,
    format: str,
) -> None:
    folder, twin = stored(model_type, format)
    hf = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = hf.generate(PROMPT, do_sample=False, **GREEDY)
    with moe_local.load(folder, slots=3, experts="native", dense="fp32", context=64) as model:
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        model.check_integrity()
        stats = model.stats()
        assert stats.evictions > 0
        assert stats.bytes.disk > 0
    assert not list(home.rglob("*"))
    told = [record.message for record in caplog.records if "reference path" in record.message]
    if library() is not None:
        assert len(told) == (format == "bf16")  # which gpt-oss keeps the other way round
        assert all(len(line.splitlines()) == 1 and "plain (transposed)" in line for line in told)


@pytest.mark.parametrize(("model_type", "format"), [("gpt_oss", "mxfp4"), ("mixtral", "fp8")])
def test_through_a_device_over_ram_over_disk(
    stored: Callable[..., tuple[Path, Path]], model_type: str, format: str
) -> None:
    """Slots of every tier hold the same scattered bytes; some misses are computed where they lie."""
    folder, twin = stored(model_type, format)
    checkpoint = Checkpoint.open(folder)
    hf = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = hf.generate(PROMPT, do_sample=False, **GREEDY)
    plan = plan_request(
        Request(
            model=checkpoint.name,
            spec=checkpoint.spec,
            ram=8 * sum(expert_bytes(checkpoint.spec, "native")),
            vram=2**30,
            experts="native",
            dense="fp32",
            context=64,
            slots=3,
        )
    ).check()
    options = LoadOptions(slots=3, experts="native", dense="fp32", context=64, miss="auto")
    device = fake_device.FakeDevice(seed=3, luck=0.2)
    with assemble(checkpoint, open_experts(checkpoint, "native"), plan, options, CPU, device) as model:
        assert model.plan.mode == "offload"
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        model.check_integrity()
        assert model.stats().misses > 0


@pytest.mark.skipif(library() is None, reason="needs the C++ library")
def test_bf16_takes_the_kernels_of_bf16(stored: Callable[..., tuple[Path, Path]]) -> None:
    """Whatever was converted and what was not gives the same logits, to the bit."""
    folder, _ = stored("mixtral", "bf16")
    logits = []
    for experts in ("native", "bf16"):
        with moe_local.load(folder, slots=3, experts=experts, context=64) as model, torch.inference_mode():
            logits.append(model.hf(PROMPT).logits)
    assert torch.equal(*logits)


# --- reading


def test_ranges_are_read_in_pieces_to_their_places(tmp_path: Path) -> None:
    """Two files, pieces shorter than ranges, gaps left alone; again after the memory held something else."""
    contents = {name: random.Random(name).randbytes(30_000) for name in ("a", "b")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ranges = (
        FileRange(tmp_path / "a", 17, 9_001, 0),
        FileRange(tmp_path / "b", 4_096, 5_000, 9_216),
        FileRange(tmp_path / "a", 20_000, 10_000, 14_336),
    )
    location = ScatteredLocation(ranges, "get it again")
    memory = bytearray(30_000)
    source = FileSource(lambda key: location, lambda layer, slot: memoryview(memory), piece_bytes=4_000)
    try:
        for fill in (0x11, 0x22):
            memory[:] = bytes([fill]) * len(memory)
            load = source.start(ExpertKey(0, 0), 0, DEMAND)
            assert load.nbytes == 24_001
            while not source.finished:
                source.wait(0.1)
                source.check_integrity()
            assert source.finished.popleft().state is LoadState.DONE
            expected = bytearray([fill]) * len(memory)
            for path, offset, nbytes, at in ranges:
                expected[at : at + nbytes] = contents[path.name][offset : offset + nbytes]
            assert memory == expected
        assert source.bytes_read == 2 * 24_001
        (tmp_path / "a").write_bytes(contents["a"][:25_000])
        load = source.start(ExpertKey(0, 0), 0, DEMAND)
        while not source.finished:
            source.wait(0.1)
        source.finished.popleft()
        assert load.state is LoadState.FAILED
        assert str(load.error) == (
            f"expert 0 of MoE layer 0 in {tmp_path / 'a'} is cut off: the file became shorter after it was "
            "opened; get it again"
        )
    finally:
        source.close()


def test_a_shard_cut_while_it_is_in_use(stored: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """One line, with the checkpoint's own remedy; experts elsewhere still come."""
    folder = shutil.copytree(stored("mixtral", "fp32")[0], tmp_path / "copy")
    with moe_local.load(folder, slots=3, experts="native", context=64) as model:
        for path in folder.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:5_000])
        with pytest.raises(TransferError, match=r"is cut off: .*; get the checkpoint again") as caught:
            model.generate(PROMPT, **GREEDY)
        assert "convert" not in str(caught.value)
        model.check_integrity()


# --- planning and refusals


def test_fit_plans_the_bits_that_are_stored(
    stored: Callable[..., tuple[Path, Path]], publish: Callable[..., tuple[Path, Path]], home: Path
) -> None:
    for model_type, format, _ in EVERYWHERE:
        plan = moe_local.fit(stored(model_type, format)[0], experts="native", context=64)
        checkpoint = Checkpoint.open(stored(model_type, format)[0])
        experts = open_experts(checkpoint, "native")
        assert plan.bytes.expert == max(experts.layout(i, 0).nbytes for i in range(3))
        matrices = sum(t.numel for t in checkpoint.spec.layers[0].tensors if len(t.shape) == 2)
        bits = 8 * plan.bytes.expert / matrices
        least = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "mxfp4": 4.25}[format]
        assert least <= bits < least + 8 * 8192 / matrices


def test_a_published_config_is_planned_without_its_weights() -> None:
    """Mixtral is published in bf16; were it in DeepSeek's FP8, a weight would take 8 + 32 / 128^2 bits."""
    from moe_local.offload.checkpoint.hub import config_of
    from moe_local.offload.checkpoint.spec import model_spec

    config = config_of("mixtral-8x7b")
    assert expert_bytes(model_spec(config), "native") == expert_bytes(model_spec(config), "bf16")
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    spec = model_spec(config)
    bits = 8 * expert_bytes(spec, "native")[0] / spec.layers[0].expert_numel
    assert bits == pytest.approx(8 + 32 / 128**2, abs=1e-3)


def test_blocks_that_end_within_joined_matrices_are_refused(
    publish: Callable[..., tuple[Path, Path]], home: Path
) -> None:
    """Gate and up of 96 rows have three rows of blocks of 40 each, which as one matrix nobody could tell."""
    checkpoint = Checkpoint.open(publish("mixtral", block=40)[0])
    with pytest.raises(
        CheckpointError, match=r"w1.weight, .*w3.weight cannot be read in place: stored in blocks"
    ):
        open_experts(checkpoint, "native")


def test_dtypes_without_a_kernel_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(make_checkpoint("mixtral"), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("experts.3.w2.weight"))
    tensors[key] = tensors[key].double()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=f"{key} cannot be read in place: stored in dtypes that no kernel"
    ):
        open_experts(Checkpoint.open(folder), "native")
    open_experts(Checkpoint.open(folder), "bf16")  # which converts it


def test_there_is_nothing_to_convert(tiny_mixtral: Path) -> None:
    with pytest.raises(OptionError, match="reads the checkpoint itself, so there is nothing to convert"):
        moe_local.convert(tiny_mixtral, experts="native")


def test_files_that_change_between_opening_and_loading(
    stored: Callable[..., tuple[Path, Path]], tmp_path: Path, home: Path
) -> None:
    folder = shutil.copytree(stored("mixtral", "fp32")[0], tmp_path / "copy")
    experts = open_experts(Checkpoint.open(folder), "native")
    experts.check_integrity()
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"had .* bytes when opened and now has"):
        experts.check_integrity()
