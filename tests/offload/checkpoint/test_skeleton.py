"""Loading everything but the experts: what is read, allocated, quantized, and left as it was."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.checkpoint.checkpoint import Checkpoint, read_config
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.checkpoint.spec import class_config, meta_model, model_class, model_spec
from moe_local.offload.dense.linear import QuantizedLinear
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.modeling.undecorated import decorate
from moe_local.offload.plan.plan import Request
from moe_local.offload.prefetch.prefetch import NoPrefetch
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.store.build import build_store
from support import tiny_models

TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "qwen2_moe", "olmoe", "deepseek_v3")
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 8], [300, 4, 4, 91, 17, 260, 12]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, dense: str = "auto", dtype: torch.dtype = torch.float32) -> Any:
    return load_skeleton(folder, read_config(folder), dense=dense, dtype=dtype, device=CPU)


def attach_all(hf: Any, folder: Path, out: Path) -> Any:
    """Serve all experts, fp32 and resident; the store."""
    checkpoint = Checkpoint.open(folder)
    file = convert_experts(checkpoint, codec_for("fp32"), out)
    slots = [8] * len(checkpoint.spec.layers)
    ladders = Request(model="tiny", spec=checkpoint.spec, ram=0, experts="fp32", context=64).ladders
    store = build_store(file, checkpoint.spec, ladders=ladders, ram_slots=slots)
    runner = ExpertRunner(store, NoPrefetch())
    for module in hf.modules():
        if isinstance(module, OffloadedExperts):
            module.attach(runner)
    return store


@pytest.mark.parametrize("model_type", TYPES)
def test_with_all_experts_it_computes_what_the_plain_model_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    folder = make_checkpoint(model_type)
    hf = load(folder)
    spec = model_spec(read_config(folder))
    assert type(hf) is model_class(hf.config)
    assert "_load_pretrained_model" not in vars(type(hf))
    assert not hf.training
    assert {name for name, _ in hf.named_parameters()} == {tensor.name for tensor in spec.dense}
    assert not [name for name, tensor in (*hf.named_parameters(), *hf.named_buffers()) if tensor.is_meta]
    assert not [name for name, parameter in hf.named_parameters() if parameter.requires_grad]
    modules = [module for module in hf.modules() if isinstance(module, OffloadedExperts)]
    assert [module.index for module in modules] == list(range(len(spec.layers)))
    store = attach_all(hf, folder, tmp_path / "experts")
    got = hf(IDS).logits
    with torch.no_grad():
        want = tiny_models.tiny_model(model_type)(IDS).logits
    store.close()
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert not got.requires_grad


def test_reads_no_tensor_of_an_expert(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("mixtral")
    read: list[str] = []

    class Spy:
        """safe_open, noting whose data somebody asks for."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = safe_open(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *exception: Any) -> None:
            self._file.__exit__(*exception)

        def get_slice(self, key: str) -> Any:
            return Slice(key, self._file.get_slice(key))

        def get_tensor(self, key: str) -> Any:
            read.append(key)
            return self._file.get_tensor(key)

    class Slice:
        def __init__(self, key: str, data: Any) -> None:
            self._key, self._data = key, data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._data, name)

        def __getitem__(self, index: Any) -> Any:
            read.append(self._key)
            return self._data[index]

    monkeypatch.setattr("transformers.modeling_utils.safe_open", Spy)
    hf = load(folder)
    assert len(read) == len(list(hf.parameters()))
    assert not [key for key in read if "experts" in key]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures peak memory by /proc")
def test_never_allocates_an_expert(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("mixtral", intermediate_size=3072, hidden_size=256, num_attention_heads=8)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 200 << 20

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    load(folder)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    load(folder)
    assert memory("VmHWM") - before < size // 8


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gemma4", "jamba", "switch_transformers"])
def test_a_model_without_numbers_is_the_one_transformers_makes(model_type: str) -> None:
    def described(model: Any) -> list[Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [str(model), [(name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors]]

    config = tiny_models.tiny_config(model_type)
    with torch.device("meta"):
        filled = model_class(config)._from_config(class_config(config))
    decorate(filled)
    assert described(meta_model(config)) == described(filled)
    assert torch.nn.init.constant_(torch.empty(2), 3).tolist() == [3, 3], "numbers are filled in again"


@pytest.mark.parametrize("dense", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_quantizes_what_the_spec_says_and_nothing_else(
    make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture, model_type: str, dense: str
) -> None:
    folder = make_checkpoint(model_type)
    hf = load(folder, dense)
    spec = model_spec(read_config(folder))
    quantized = {
        f"{name}.weight" for name, module in hf.named_modules() if isinstance(module, QuantizedLinear)
    }
    assert quantized == spec.quantizable | {"lm_head.weight"}
    exact = {name: p for name, p in hf.named_parameters() if name not in quantized}
    assert {p.dtype for name, p in exact.items() if "bias" not in name} == {torch.float32}
    assert sum(isinstance(module, OffloadedExperts) for module in hf.modules()) == len(spec.layers)
    with torch.no_grad():
        logits = hf(IDS).logits
        plain = load(folder)(IDS).logits
    error = float((logits - plain).norm() / plain.norm())
    assert 1e-4 < error < (0.5 if dense == "nf4" else 0.1)
    assert caplog.records == []


@pytest.mark.parametrize("dense", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_bitsandbytes_is_asked_to_quantize_what_the_spec_says_for_cuda(
    make_checkpoint: Callable[..., Path], model_type: str, dense: str
) -> None:
    """Loaded as on CUDA, but to the CPU, where bitsandbytes runs, too."""
    folder = make_checkpoint(model_type)
    config = read_config(folder)
    cls = model_class(config)
    hf = skeleton._swapping(cls).from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=skeleton._bitsandbytes(meta_model(config), dense, torch.float32),
    )
    if dense == "int8":
        skeleton._flatten_inputs(hf)
    kinds = ("Linear4bit", "Linear8bitLt")
    found = {f"{name}.weight" for name, module in hf.named_modules() if type(module).__name__ in kinds}
    assert found == model_spec(config).quantizable
    with torch.no_grad():
        logits, plain = hf(IDS).logits, load(folder)(IDS).logits
    error = float((logits - plain).norm() / plain.norm())
    assert 1e-4 < error < (0.5 if dense == "nf4" else 0.1)


@pytest.mark.parametrize("dense", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_quantized_dense_part_computes_what_its_decoded_weights_do(
    make_checkpoint: Callable[..., Path], model_type: str, dense: str
) -> None:
    """deepseek_v3 has shared experts, gpt_oss biases."""
    folder = make_checkpoint(model_type)
    hf, plain = load(folder, dense), load(folder)
    for name, module in list(hf.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = plain.get_submodule(name).weight
            weight.copy_(codec_for(dense).decode(module.weight, module.layout, torch.float32)["weight"])
            assert (module.bias is None) == (plain.get_submodule(name).bias is None)
            assert module.bias is None or torch.equal(module.bias, plain.get_submodule(name).bias)
    torch.testing.assert_close(hf(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(hf.generate(IDS, **options), plain.generate(IDS, **options))


def test_a_tied_head_stays_the_embedding(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("mixtral", tie_word_embeddings=True)
    hf = load(folder, "nf4")
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    spec = model_spec(read_config(folder))
    assert spec.quantizable_on_cpu == spec.quantizable


def test_one_weight_at_a_time_is_there_unquantized(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 made of an fp32 file, so that what is kept of it is memory of the process."""
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    quantize = QuantizedLinear.quantized

    def spy(self: QuantizedLinear, name: str, values: torch.Tensor) -> torch.nn.Parameter:
        assert values.dtype == torch.bfloat16
        alive.append(sum(tensor() is not None for tensor in seen))
        seen.append(weakref.ref(values))
        return quantize(self, name, values)

    monkeypatch.setattr(QuantizedLinear, "quantized", spy)
    load(make_checkpoint("mixtral"), "nf4", torch.bfloat16)
    assert len(alive) == 13
    assert max(alive) <= 1


def test_a_quantized_model_loads_twice_and_refuses_to_be_saved(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("mixtral")
    config = read_config(folder)
    for dense in ("nf4", "int8", "auto"):
        hf = load_skeleton(folder, config, dense=dense, dtype=torch.float32, device=CPU)
        assert any(isinstance(module, QuantizedLinear) for module in hf.modules()) == (dense != "auto")
        assert getattr(config, "quantization_config", None) is None
        if dense != "auto":
            assert f"format={dense}" in repr(hf)
            assert hf.config.to_dict()["quantization_config"]["format"] == dense
            with pytest.raises(ValueError, match="not serializable"):
                hf.save_pretrained(tmp_path)


def test_bf16_is_the_dtype_of_everything(make_checkpoint: Callable[..., Path]) -> None:
    hf = load(make_checkpoint("qwen3_moe"), "bf16", torch.bfloat16)
    assert {parameter.dtype for parameter in hf.parameters()} == {torch.bfloat16}


@pytest.fixture
def copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A Mixtral folder that may be damaged."""
    shutil.copytree(make_checkpoint("mixtral"), tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_weights_are_one_clear_line(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .* model\.norm\.weight") as info:
        load(copied)
    assert "\n" not in str(info.value)


def test_weights_of_another_shape_are_one_clear_line(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight as \[65\] where .* says \[64\]") as info:
        load(copied)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("dense", ["nf4", "int8"])
def test_weights_that_cannot_be_quantized_are_one_clear_line(copied: Path, dense: str) -> None:
    path = copied / "model.safetensors"
    name = "model.layers.1.self_attn.o_proj.weight"
    whole = load_file(path)
    save_file({**whole, name: torch.ones(64, 32)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} as \[64, 32\] where .* says \[64, 64\]") as info:
        load(copied, dense)
    assert "\n" not in str(info.value)
    whole[name][3, 4] = torch.nan
    save_file(whole, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.o_proj: weight has 1 of 4096 .* NaN"
    ) as info:
        load(copied, dense)
    assert "\n" not in str(info.value)
    del whole[name]
    save_file(whole, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks 1 weights .* {name}"):
        load(copied, dense)


def test_a_model_without_experts_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="no routed experts"):
        load(make_checkpoint("llama"))


def test_leaves_the_class_and_the_verbosity_as_they_were(
    copied: Path, make_checkpoint: Callable[..., Path]
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        cls = model_class(read_config(copied))
        before = dict(vars(cls)), cls._load_pretrained_model
        load(copied)
        (copied / "model.safetensors").write_bytes(json.dumps({}).encode())
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever safetensors says to this
            load(copied)
        assert (dict(vars(cls)), cls._load_pretrained_model) == before
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    plain = cls.from_pretrained(make_checkpoint("mixtral"))
    assert not [module for module in plain.modules() if isinstance(module, OffloadedExperts)]


def test_loads_in_several_threads_do_not_disturb_each_other(make_checkpoint: Callable[..., Path]) -> None:
    from transformers.utils import logging

    made: dict[int, Any] = {}
    folders = [make_checkpoint("mixtral"), make_checkpoint("qwen3_moe"), make_checkpoint("mixtral")]
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16]
    verbosity = logging.get_verbosity()

    def work(i: int) -> None:
        made[i] = load(folders[i], dtype=dtypes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 1, 2]
    for i, hf in made.items():
        assert sum(isinstance(module, OffloadedExperts) for module in hf.modules()) == 3
        assert {parameter.dtype for parameter in hf.parameters()} == {dtypes[i]}
    assert torch.get_default_dtype() == torch.float32
    assert logging.get_verbosity() == verbosity
