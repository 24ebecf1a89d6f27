"""A checkpoint folder: its config, its shape, and its routed experts one at a time."""

from __future__ import annotations

import json
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from moe_local.cache.errors import CheckpointError, ModelNotFoundError, first_line
from moe_local.cache.files import parse_json
from moe_local.offload.checkpoint.config_limits import check_config
from moe_local.offload.checkpoint.dense_weights import DenseWeights
from moe_local.offload.checkpoint.expert_sources import ExpertSources
from moe_local.offload.checkpoint.files import MODELOPT_CONFIG, file_inside, find_gguf
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.gguf_model import config_fields, model_weights
from moe_local.offload.checkpoint.quantization import Quantization
from moe_local.offload.checkpoint.registry import DEMO, find_alias, hub_id, short_name
from moe_local.offload.checkpoint.shards import Shards
from moe_local.offload.checkpoint.spec import ModelSpec, MoELayer, meta_model, model_spec
from moe_local.offload.checkpoint.weights import Weight, find_weights
from moe_local.offload.modeling.configs import OTHER_NAMES, make_config
from moe_local.offload.system.direct_io import Memory, page_memory


class Checkpoint:
    """A safetensors checkpoint in the layout of the Hugging Face Hub or a GGUF file, opened for reading.

    Holds no weights and no open files. Reading is safe from any number of threads.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Any,
        spec: ModelSpec,
        shards: Shards,
        weights: dict[str, Weight],
        sources: ExpertSources,
    ):
        self.folder = folder
        self.name = name
        """The same name whatever the user called the model: its alias, Hub id, or folder's or file's name."""
        self.config = config
        """transformers' config object."""
        self.spec = spec
        self.shards = shards
        self.weights = weights
        """Every weight in the shards, experts included, by its key in an unquantized checkpoint."""
        self.gguf: Path | None = None
        """For GGUF, the file (the first, if it is split), which is in `folder`; None for safetensors."""
        self._sources = sources

    @classmethod
    def open(cls, folder: Path, name: str | None = None) -> Checkpoint:
        """Read the config and all shard headers, and find every expert; reads no weights.

        `name` is what the user called the model. Raises ModelNotFoundError if there is no such
        folder, and CheckpointError if the checkpoint is incomplete, damaged, pickled, needs code of its own,
        or has no routed experts.
        """
        folder = Path(folder)
        if (path := find_gguf(folder)) is not None:
            return cls._open_gguf(path)
        name = short_name(name or str(folder))
        remedy = "get the checkpoint again"
        if name == DEMO:
            remedy = "install moe-local again"
        elif find_alias(name) or hub_id(name):
            remedy = f"get it again: moe-local pull {name}"
        config = read_config(folder)
        shards = Shards.open(folder, remedy)
        model = meta_model(config)
        spec = model_spec(config, model)
        weights = find_weights(shards, Quantization.of(config))
        sources = ExpertSources.find(model, spec, weights, remedy)
        return cls(folder, name, config, spec, shards, weights, sources)

    @classmethod
    def _open_gguf(cls, path: Path) -> Checkpoint:
        file = GgufFile.open(path)
        config = read_config(path)
        model = meta_model(config)
        spec = model_spec(config, model)
        weights = {weight.key: weight for weight in model_weights(file, config)}
        sources = ExpertSources.find(model, spec, weights, file.shards.remedy)
        checkpoint = cls(path.parent, path.stem, config, spec, file.shards, weights, sources)
        checkpoint.gguf = path
        return checkpoint

    def read_expert(
        self, layer: MoELayer, expert: int, memory: Memory = page_memory
    ) -> dict[str, torch.Tensor]:
        """The weights of one expert, names and shapes as `layer.tensors`, matrices [out, in] and contiguous.

        They are on the CPU, in their stored dtype, and read into `memory`, by default new memory of the
        caller's own. Quantized weights come dequantized to float32, in new memory.
        Opens only the shards that hold this expert. Blocks on the disk. Raises CheckpointError if a shard
        cannot be read.
        """
        return self._sources.read(self.shards, layer, expert, memory)

    def expert_pieces(self, layer: MoELayer, expert: int) -> dict[str, list[Weight]]:
        """The stored weights that form each of `layer.tensors`; see ExpertSources.pieces."""
        return self._sources.pieces(layer, expert)

    def dense_weights(self) -> DenseWeights | None:
        """The weights for `load_skeleton`; None if transformers can read the safetensors files itself, since
        nothing is quantized."""
        if self.gguf is None and all(weight.format == "plain" for weight in self.weights.values()):
            return None
        return DenseWeights(self.shards, self.weights, complete=self.gguf is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the source of the routed experts: 32 hex digits.

        Equal for a copy of the folder; different for another model, layout, dtype, or for other weights under
        the same names (`Shards.digest`). Reads from the shards on first use.
        """
        experts = [
            [
                layer.name,
                layer.num_experts,
                layer.transposed,
                [[t.name, list(t.shape)] for t in layer.tensors],
            ]
            for layer in self.spec.layers
        ]
        digest = xxhash.xxh3_128()
        digest.update(json.dumps([self.spec.model_type, self.spec.architecture, experts]).encode())
        digest.update(self.shards.digest().encode())
        return digest.hexdigest()

    def check_integrity(self) -> None:
        """Raise CheckpointError if the files on disk are no longer those that were opened."""
        self.shards.check_integrity()


def read_config(folder: Path) -> Any:
    """transformers' config from `folder`/config.json; never runs code from the checkpoint.

    For a GGUF file, from a config.json beside it or else from its metadata. Raises ModelNotFoundError (no
    folder), or CheckpointError as `parse_config` does.
    """
    if (path := find_gguf(folder)) is not None:
        if (path.parent / "config.json").is_file():
            return parse_config(path.parent / "config.json")
        return _make_config(config_fields(GgufFile.open(path)), path)
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the one that holds config.json")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    return parse_config(folder / "config.json")


def parse_config(path: Path) -> Any:
    """transformers' config from a config.json.

    Raises CheckpointError: not JSON, a model type that transformers does not have (whether or not the
    checkpoint brings code for it), absurd sizes, or weights quantized in a way that moe-local cannot read.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        fields = parse_json(path.read_bytes(), object_hook=_special_float)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not valid JSON; get the checkpoint again") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise CheckpointError(f"{path} names no model_type; give the folder of a Hugging Face checkpoint")
    model_type = str(fields["model_type"])
    if model_type not in CONFIG_MAPPING and model_type in OTHER_NAMES:
        model_type = fields["model_type"] = OTHER_NAMES[model_type]
    if model_type not in CONFIG_MAPPING:
        code = " and brings code of its own, which moe-local never runs" if "auto_map" in fields else ""
        raise CheckpointError(
            f"{path}: model type {reprlib.repr(model_type)} is unknown to this transformers{code}; "
            "a newer transformers may know it: pip install -U transformers"
        )
    if not fields.get("quantization_config") and path.with_name(MODELOPT_CONFIG).is_file():
        fields["quantization_config"] = _modelopt_settings(path.with_name(MODELOPT_CONFIG))
    return _make_config(fields, path)


def _modelopt_settings(path: Path) -> dict[str, Any]:
    """What earlier releases of NVIDIA Model Optimizer wrote beside config.json only."""
    try:
        settings = parse_json(file_inside(path.parent, path.name).read_bytes())["quantization"]
        return {**settings, "quant_method": "modelopt"}
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} does not describe a quantization; get the checkpoint again") from error


MOST_OF_A_REASON = 300
"""How many characters of transformers' complaint about a config are shown."""


def _make_config(fields: dict[str, Any], path: Path) -> Any:
    try:
        check_config(fields)
        Quantization.of(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        return make_config(fields)
    except Exception as error:  # transformers validates with several unrelated exception types
        reason = first_line(error)
        if len(reason) > MOST_OF_A_REASON:  # it quotes values from the file, however long
            reason = reason[:MOST_OF_A_REASON] + "..."
        raise CheckpointError(f"{path} is not a valid {fields['model_type']} config: {reason}") from error


def _special_float(value: dict[str, Any]) -> Any:
    """Turn {"__float__": "Infinity"}, as transformers writes floats that JSON lacks, into that float."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
