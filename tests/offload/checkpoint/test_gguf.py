"""GGUF files: the same ids as transformers gives on what llama.cpp's own package decodes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_local
from moe_local.cache.errors import CheckpointError, ModelNotFoundError
from moe_local.offload.checkpoint.checkpoint import Checkpoint, read_config
from moe_local.offload.checkpoint.files import find_gguf
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.gguf_model import config_fields
from moe_local.offload.checkpoint.hub import locate
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from moe_local.offload.load import open_experts
from support import gguf_models, tiny_models

torch.set_num_threads(1)

WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
"""The K formats have blocks of 256 numbers."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "mixtral": ("mixtral", {"exps.weight": "Q4_0", "attn_q.weight": "NVFP4", "attn_k.weight": "Q4_0"}, {}),
    "qwen3_moe": (
        "qwen3_moe",
        {"down_exps.weight": "IQ4_NL", "exps.weight": "Q8_0", "token_embd.weight": "F16"},
        {},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"up_exps.weight": "Q4_1", "down_exps.weight": "Q5_1", "exps.weight": "Q5_0"}
        | {"ffn_gate_shexp.weight": "BF16"},
        {},
    ),
    "qwen3_5_moe": ("qwen3_5_moe", {"exps.weight": "Q8_0", "ssm_out.weight": "Q8_0"}, {}),
    "qwen3_5_moe by Ollama": ("qwen3_5_moe", {"exps.weight": "Q8_0"}, {}),
    "qwen3_next": ("qwen3_next", {"exps.weight": "Q8_0", "attn_gate.weight": "NVFP4"}, {}),
    "qwen3_next, old": ("qwen3_next", {"exps.weight": "Q8_0"}, {}),
    "gemma4": ("gemma4", {"exps.weight": "Q8_0"}, {"final_logit_softcapping": 30.0}),
    "deepseek_v2": (
        "deepseek_v2",
        {"exps.weight": "Q8_0", "attn_k_b.weight": "F16"},
        {"rope_parameters": YARN},
    ),
    "deepseek_v2, old": (
        "deepseek_v2",
        {"exps.weight": "Q8_0"},
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"exps.weight": "NVFP4", "attn_q_a.weight": "NVFP4", "output.weight": "NVFP4"},
        {"rope_parameters": YARN},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {"exps.weight": "Q8_0"}, {}),
    "glm4_moe_lite by Ollama": (
        "glm4_moe_lite",
        {"exps.weight": "Q8_0"},
        {"n_group": 1, "topk_group": 1, "v_head_dim": 32},
    ),
    "gpt_oss": ("gpt_oss", {"exps.weight": "MXFP4", "token_embd.weight": "Q8_0"}, {}),
    "gpt_oss by Ollama": ("gpt_oss", {"exps.weight": "MXFP4", "exps.bias": "BF16"}, {}),
    "glm4_moe": (
        "glm4_moe",
        {"down_exps.weight": "Q8_0", "exps.weight": "Q4_0"},
        {"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1},
    ),
    "minimax_m2": (
        "minimax_m2",
        {"exps.weight": "Q5_0"},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "k": (
        "mixtral",
        {
            "gate_exps.weight": "Q4_K",
            "up_exps.weight": "Q5_K",
            "down_exps.weight": "Q6_K",
            "attn_q.weight": "IQ4_XS",
            "attn_v.weight": "Q3_K",
            "attn_output.weight": "Q2_K",
            "output.weight": "Q6_K",
        },
        WIDE,
    ),
    "iq": (
        "mixtral",
        {
            "gate_exps.weight": "IQ2_XXS",
            "up_exps.weight": "IQ3_XXS",
            "down_exps.weight": "IQ2_S",
            "attn_q.weight": "IQ3_S",
            "attn_k.weight": "IQ2_XS",
            "attn_v.weight": "IQ1_M",
            "attn_output.weight": "IQ1_S",
            "output.weight": "TQ1_0",
            "token_embd.weight": "TQ2_0",
        },
        WIDE,
    ),
}


@pytest.fixture(scope="module")
def made(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """made("mixtral") -> the GGUF file of a case and its twin, made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def made(case: str) -> tuple[Path, Path]:
        if case not in found:
            model_type, kinds, config = CASES[case]
            folder = tmp_path_factory.mktemp(case) / "gguf"
            source = make_checkpoint(model_type, **config)
            found[case] = gguf_models.write(source, folder, kinds, ollama="Ollama" in case, old="old" in case)
        return found[case]

    return made


SLOW = (
    "qwen3_moe",
    "qwen2_moe",
    "glm4_moe",
    "minimax_m2",
    "gpt_oss by Ollama",
    "qwen3_5_moe by Ollama",
    "qwen3_next, old",
    "deepseek_v2, old",
    "glm4_moe_lite",
    "glm4_moe_lite by Ollama",
    "deepseek_v2",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]
)
def test_greedy_ids_and_weights_are_those_of_transformers(
    made: Callable[[str], tuple[Path, Path]], case: str, check_like: Callable[[Any, Path], None]
) -> None:
    """With the config from the metadata, heads turned back, and without a tokenizer."""
    path, twin = made(case)
    check_like(AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval(), path)
    assert load_tokenizer(path.parent, path) is None


UNSAID = {"architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
UNSAID |= {"num_nextn_predict_layers", "num_mtp_layers"}
"""Fields of a config that neither sizes nor the forward depend on, or that say it in another way."""


def flat(field: Any) -> Any:
    """A field of a config without fields in its fields."""
    if not isinstance(field, dict):
        return field
    return {f"{name}.{inner}": value for name, part in field.items() for inner, value in inside(part).items()}


def inside(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {"": part}


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("k", "iq") and "lite" not in case])
def test_the_config_is_the_twins(made: Callable[[str], tuple[Path, Path]], case: str) -> None:
    path, twin = made(case)
    found, expected = read_config(path), read_config(twin).get_text_config()
    assert type(found) is type(expected)
    fields, wanted = found.to_dict(), expected.to_dict()
    for name in fields.keys() & wanted.keys() - UNSAID:
        assert flat(fields[name]) == pytest.approx(flat(wanted[name])), name
    assert read_config(path.parent).to_dict() == fields  # a folder with only this file
    plan = moe_local.fit(path, context=64)
    assert plan.bytes.expert == moe_local.fit(twin, context=64).bytes.expert


def test_one_expert_is_read_at_a_time(made: Callable[[str], tuple[Path, Path]]) -> None:
    """Its own rows of the packed tensors, bit-equal to the twin's."""
    path, twin = made("k")
    checkpoint, plain = Checkpoint.open(path), Checkpoint.open(twin)
    asked: list[int] = []
    read = checkpoint.shards.read

    def counting(groups: Any, *more: Any) -> Any:
        asked.append(sum(tensor.nbytes for group in groups for tensor in group))
        return read(groups, *more)

    checkpoint.shards.read = counting  # type: ignore[method-assign]
    layer = checkpoint.spec.layers[1]
    for expert in range(layer.num_experts):
        found, expected = checkpoint.read_expert(layer, expert), plain.read_expert(layer, expert)
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name
    assert asked == [256 * (144 + 176 + 210)] * layer.num_experts
    assert checkpoint.fingerprint != plain.fingerprint
    checkpoint.check_integrity()


def test_mxfp4_experts_convert_without_loss(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """gpt-oss' experts, converted to mxfp4, decode to the file's numbers."""
    path, twin = made("gpt_oss")
    with moe_local.load(path, slots=3, experts="mxfp4", dense="fp32", context=64) as model:
        prompt = torch.randint(3, 320, (1, 11), generator=torch.Generator().manual_seed(1))
        options = {"max_new_tokens": 8, "eos_token_id": None}
        hf = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
        expected = hf.generate(prompt, do_sample=False, **options)
        assert torch.equal(model.generate(prompt, **options), expected)


def test_a_config_and_a_tokenizer_beside_it_come_first(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    path, twin = made("mixtral")
    shutil.copy(path, tmp_path)
    config = json.loads((twin / "config.json").read_text()) | {"rms_norm_eps": 0.125}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.rms_norm_eps == 0.125
    assert checkpoint.name == "model"
    text = "the expert"
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.gguf)
    assert tokenizer(text)["input_ids"] == tiny_models.tiny_tokenizer()(text)["input_ids"]


def test_tokens_that_end_an_answer(made: Callable[[str], tuple[Path, Path]]) -> None:
    """Ollama lists all of gpt-oss'; GLM ends turns with another token than texts."""
    assert read_config(made("gpt_oss by Ollama")[0]).eos_token_id == [2, 5]
    file = GgufFile.open(made("glm4_moe")[0])
    file.metadata["tokenizer.ggml.eos_token_id"], file.metadata["tokenizer.ggml.eot_token_id"] = 2, 7
    assert config_fields(file)["eos_token_id"] == [2, 7]


# --- files that are not whole


def test_a_missing_tensor_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("mixtral")
    path, _ = gguf_models.write(source, tmp_path / "a", {}, leave_out="blk.1.ffn_up_exps.weight")
    with pytest.raises(
        CheckpointError, match=r"expert 0 of model.layers.1.mlp.experts: .*ffn_up_exps.* is missing"
    ):
        Checkpoint.open(path)
    path, _ = gguf_models.write(source, tmp_path / "b", {}, leave_out="blk.2.attn_v.weight")
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights .* such as model.layers.2.self_attn.v_proj.weight"
    ):
        moe_local.load(path, slots=3, experts="fp32")
    path, _ = gguf_models.write(source, tmp_path / "c", {}, leave_out="token_embd.weight")
    with pytest.raises(CheckpointError, match=r"lacks the tensor token_embd.weight; get the file again"):
        Checkpoint.open(path)


def test_damaged_files(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    raw = made("mixtral")[0].read_bytes()
    path = tmp_path / "x.gguf"
    count = raw.index(b"llama.block_count") + len("llama.block_count") + 4  # behind the number's type
    for content, message in (
        (raw[:-100], r"is cut short, inside tensor .*; get the file again"),
        (raw[:300], r"is cut short or corrupt inside its header; get the file again"),
        (raw[:20], r"is cut short or corrupt inside its header"),
        (b"GGML" + raw[4:], "is no GGUF file"),
        (raw[:4] + struct.pack("<I", 1) + raw[8:], "is GGUF version 1, only 2 and 3 are read"),
        (
            raw.replace(b"llama", b"falco"),
            r"architecture 'falco', and only Mixtral, .*, gpt-oss, .* are read from GGUF",
        ),
        (raw.replace(b"llama.block_count", b"llama.block_kount"), "lacks llama.block_count in its metadata"),
        (raw[:count] + struct.pack("<I", 10**6) + raw[count + 4 :], "x.gguf: num_hidden_layers is 1e"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(path)
        assert "\n" not in str(caught.value)


def test_a_config_beside_it_of_another_model(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    raw = made("qwen3_next")[0].read_bytes()
    shutil.copy(made("mixtral")[1] / "config.json", tmp_path)
    (tmp_path / "x.gguf").write_bytes(raw)
    message = r"a file of Qwen3-Next, and config.json beside it describes a mixtral; remove that or put"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
    (tmp_path / "x.gguf").write_bytes(raw.replace(b"qwen3next", b"qwen9next"))
    with pytest.raises(CheckpointError, match="architecture 'qwen9next', and only"):
        Checkpoint.open(tmp_path)


def test_groups_of_experts_must_be_known(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Older files of DeepSeek do not say which experts form a group; a config.json beside them does."""
    path, twin = made("deepseek_v3")
    raw = path.read_bytes().replace(b"deepseek2.expert_group_count", b"deepseek2.expert_group_kount")
    (tmp_path / "x.gguf").write_bytes(raw)
    message = r"lacks deepseek2.expert_group_count in its metadata; put the model's config.json beside it"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
    shutil.copy(twin / "config.json", tmp_path)
    assert Checkpoint.open(tmp_path).config.n_group == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_count", 2**32 - 1, r"num_hidden_layers is 4\.295e\+09, and no model has more"),
        ("attention.key_length", 0, r"says qwen3next.attention.key_length is 0; get another file"),
        (
            "ssm.group_count",
            3,
            r"attn_qkv.weight in x.gguf has shape \[128, 64\], which does not fit the config",
        ),
    ],
)
def test_absurd_numbers(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, value: int, message: str
) -> None:
    raw = made("qwen3_next")[0].read_bytes()
    at = raw.index(f"qwen3next.{name}".encode()) + len(f"qwen3next.{name}") + 4  # behind the number's type
    (tmp_path / "x.gguf").write_bytes(raw[:at] + struct.pack("<I", value) + raw[at + 4 :])
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_types_that_are_not_read(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    raw = made("mixtral")[0].read_bytes()
    name = b"blk.1.ffn_down_exps.weight"
    at = raw.index(name) + len(name) + 4 + 3 * 8  # behind the dimensions
    assert raw[at : at + 4] == struct.pack("<I", gguf.GGMLQuantizationType.Q4_0)
    (tmp_path / "x.gguf").write_bytes(raw[:at] + struct.pack("<I", 41) + raw[at + 4 :])
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.weight in x.gguf is stored as ggml type 41"):
        Checkpoint.open(tmp_path / "x.gguf")


def test_rows_of_parts_of_blocks(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    raw = made("mixtral")[0].read_bytes()
    name = b"blk.1.ffn_down_exps.weight"
    at = raw.index(name) + len(name) + 4
    (tmp_path / "x.gguf").write_bytes(raw[:at] + struct.pack("<Q", 48) + raw[at + 8 :])
    message = r"ffn_down_exps.weight in x.gguf has rows of 48 numbers in Q4_0, whose blocks have 32; get the"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / "x.gguf")


def test_scales_that_do_not_fit(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    raw, name = made("mixtral")[0].read_bytes(), b"blk.1.attn_q.scale"
    at = raw.index(name) + len(name) + 4
    assert raw[at : at + 8] == struct.pack("<Q", 1)
    for content, message in (
        (raw[:at] + struct.pack("<Q", 2) + raw[at + 8 :], r"attn_q.scale \[2\] in .* \(NVFP4\); get the"),
        (raw.replace(name, b"blk.1.attn_v.scale"), r"attn_v.scale \[1\] in .*attn_v.* \(plain\); get the"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / "x.gguf")


def test_native_is_for_formats_that_kernels_read(made: Callable[[str], tuple[Path, Path]]) -> None:
    with pytest.raises(CheckpointError, match="cannot be read in place: stored as Q4_0"):
        open_experts(Checkpoint.open(made("mixtral")[0]), "native")


def split(path: Path, folder: Path, *, tensors_first: bool) -> list[Path]:
    """The file in two, as by llama.cpp's gguf-split: all metadata and some or no tensors, then the rest."""
    reader = gguf.GGUFReader(path)
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, target in enumerate(paths):
        writer = gguf.GGUFWriter(target, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if key.startswith("llama."):
                writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in reader.tensors[number::2] if tensors_first else reader.tensors if number else []:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("tensors_first", [True, False])
def test_split_files(made: Callable[[str], tuple[Path, Path]], tmp_path: Path, tensors_first: bool) -> None:
    whole = Checkpoint.open(made("mixtral")[0])
    paths = split(made("mixtral")[0], tmp_path, tensors_first=tensors_first)
    assert find_gguf(tmp_path) == paths[0]
    for named in (tmp_path, *paths):
        checkpoint = Checkpoint.open(named)
        assert set(checkpoint.shards.sizes) == {path.name for path in paths}
        for layer in whole.spec.layers:
            found, expected = checkpoint.read_expert(layer, 5), whole.read_expert(layer, 5)
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf of 2 parts is missing"):
        GgufFile.open(paths[0])


def test_a_file_without_an_ending(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """As Ollama keeps them; or a link to one, in a folder of its own."""
    path, twin = made("gpt_oss by Ollama")
    blob = tmp_path / f"sha256-{'0f' * 32}"
    shutil.copy(path, blob)
    link = tmp_path / "mine" / "model.gguf"
    link.parent.mkdir()
    link.symlink_to(blob)
    plain = Checkpoint.open(twin)
    for named in (blob, link, link.parent):
        assert locate(named) == named
        checkpoint = Checkpoint.open(named)
        layer = checkpoint.spec.layers[0]
        found, expected = checkpoint.read_expert(layer, 3), plain.read_expert(layer, 3)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert Checkpoint.open(blob).name == blob.name
    blob.write_bytes(b"GGML" + blob.read_bytes()[4:])
    with pytest.raises(ModelNotFoundError, match="is a file, but no GGUF file; a model is"):
        locate(blob)


def test_a_folder_with_several(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(made("mixtral")[0], tmp_path / name)
    with pytest.raises(
        ModelNotFoundError, match=r"holds 2 GGUF models \(a.gguf, b.gguf\); name the file itself"
    ):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path / "b.gguf").name == "b"
