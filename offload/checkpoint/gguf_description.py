"""Reads what a GGUF file's metadata says about its model."""

from __future__ import annotations

from typing import Any

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.config_limits import LARGEST
from moe_local.offload.checkpoint.gguf_file import GgufFile

Fields = dict[str, Any]
"""Those of a config.json."""


class Description:
    """What a file says about its model: the metadata of its architecture, and which tensors it has."""

    def __init__(self, file: GgufFile) -> None:
        self.architecture = str(file.metadata.get("general.architecture"))
        self._file = file

    def said(self, name: str) -> Any:
        """The value of a field, or None."""
        return self._file.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: Any = None) -> Any:
        """A field that is a number above zero, or `default`.

        Raises CheckpointError if it is missing and there is no default, and for all other values.
        """
        value = self.said(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self._file.path} lacks {self.architecture}.{name} in its metadata; put the model's "
                "config.json beside it, or get another file"
            )
        if not isinstance(value, int | float) or not 0 < value < LARGEST:
            raise self.senseless(name)
        return value

    def senseless(self, name: str) -> CheckpointError:
        """The error for a field's value."""
        return CheckpointError(
            f"{self._file.path} says {self.architecture}.{name} is {str(self.said(name))[:80]}; "
            "get another file"
        )

    def count(self, name: str) -> int:
        """A field that is a number of things, zero if it is missing."""
        return int(self.number(name)) if self.said(name) else 0

    def require(self, name: str, known: Any, meaning: str) -> None:
        """Raise CheckpointError, which says that the file has no `meaning`, if a field is there and not
        `known`."""
        value = self.said(name)
        if value is not None and value != known:
            raise CheckpointError(
                f"{self._file.path} says {self.architecture}.{name} is {value!r}, and only {known!r} "
                f"({meaning}) is read from GGUF for this family; use the model's safetensors"
            )

    def has(self, tensor: str) -> bool:
        """Whether a layer has this tensor."""
        return any(key.endswith(f".{tensor}") for key in self._file.weights)

    def layers(self) -> int:
        """The number of layers without those that predict further tokens, which come last."""
        layers = int(self.number("block_count")) - self.count("nextn_predict_layers")
        if layers < 1:
            raise self.senseless("nextn_predict_layers")
        return layers

    def key_value_heads(self) -> int:
        """The same for all layers that have any: Ollama says it for each, zero for linear attention."""
        name = "attention.head_count_kv"
        said = self.said(name)
        found = set(said) - {0} if isinstance(said, tuple) else set()
        if len(found) == 1:
            return int(found.pop())
        return int(self.number(name, self.number("attention.head_count")))

    def head_dim(self) -> int:
        heads = self.number("attention.head_count")
        return max(1, int(self.number("attention.key_length", self.number("embedding_length") // heads or 1)))

    def rotation(self, *, partial: bool = False) -> Fields:
        """transformers' rope_parameters without scaling. `partial`: the file says how much of a head turns.

        Raises CheckpointError if the file scales its rotations.
        """
        if (self.said("rope.scaling.type") or "none") != "none":
            raise CheckpointError(
                f"{self._file.path} scales its rotations, which is not read from GGUF for this family; "
                "use the model's safetensors"
            )
        found = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 10000.0)}
        if partial:
            found["partial_rotary_factor"] = self.number("rope.dimension_count") / self.head_dim()
        return found

    def yarn(self) -> Fields:
        """rope_parameters with YaRN's scaling."""
        return {
            "rope_type": "yarn",
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "factor": self.number("rope.scaling.factor"),
            "original_max_position_embeddings": self.number("rope.scaling.original_context_length"),
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
        }
