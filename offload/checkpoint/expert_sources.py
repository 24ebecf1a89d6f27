"""Finds and converts the stored tensors of single experts by transformers' own conversion rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.gguf_model import expert_part, expert_parts
from moe_local.offload.checkpoint.shards import Shards
from moe_local.offload.checkpoint.spec import ModelSpec, MoELayer, experts_modules, layer_number
from moe_local.offload.checkpoint.weights import Weight
from moe_local.offload.modeling.undecorated import conversion_rules
from moe_local.offload.system.direct_io import Memory, page_memory

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming


@dataclass(slots=True)
class ExpertSource:
    """The stored weights that one parameter of one expert is made of.

    `parts` are the checkpoint's weights by the key pattern of the converter that matches them; `converter` is
    None if the tensor is stored as the model keeps it. `row` is the expert's place in packed tensors
    [E, ...], None if each expert has tensors of its own.
    """

    converter: WeightConverter | None
    row: int | None
    parts: dict[str, Weight] = field(default_factory=dict)

    def ordered(self) -> dict[str, Weight]:
        """The weights to read for the expert, in the order in which the converter joins them."""
        order = list(self.parts) if self.converter is None else self.converter.source_patterns
        parts = {pattern: self.parts[pattern] for pattern in order if pattern in self.parts}
        return parts if self.row is None else {pattern: part.at(self.row) for pattern, part in parts.items()}

    def absent(self, expert: int) -> str | None:
        """The end of the key of a missing part, or None."""
        patterns = [] if self.converter is None else self.converter.source_patterns
        missing = [pattern for pattern in patterns if pattern not in self.parts]
        return missing[0].replace("\\", "").replace("*", str(expert)) if missing else None


class ExpertSources:
    """Every routed expert's sources, and the conversion of one expert to the shapes of its layer."""

    def __init__(
        self, sources: Mapping[tuple[str, int], ExpertSource], parameters: Mapping[str, tuple[int, ...]]
    ):
        self._sources = dict(sources)
        self._parameters = dict(parameters)

    @classmethod
    def find(cls, model: Any, spec: ModelSpec, weights: Mapping[str, Weight], remedy: str) -> ExpertSources:
        """Match the keys of `weights` to the experts of `model` (on the meta device).

        The rules are those of transformers' loader (core_model_loading.convert_and_load_state_dict_in_model),
        except that an expert's number is read from its key instead of counted. Keys of parts the model does
        not have, such as layers for multi-token prediction, are ignored. Reads no weights. Raises
        CheckpointError, naming the tensor, if an expert is incomplete or a shape does not fit the config.
        """
        state = model.state_dict()
        parameters = {
            f"{layer.name}.{tensor.name}": tuple(state[f"{layer.name}.{tensor.name}"].shape)
            for layer in spec.layers
            for tensor in layer.tensors
        }
        found: dict[tuple[str, int], ExpertSource] = {}
        for match in _matches(model, state, weights.values()):
            if match.parameter in parameters:
                _add(found, match, parameters[match.parameter][0])
        sources = cls(found, parameters)
        for layer in spec.layers:
            sources._check(layer, remedy)
        return sources

    def read(
        self, shards: Shards, layer: MoELayer, expert: int, memory: Memory = page_memory
    ) -> dict[str, torch.Tensor]:
        """The tensors of `expert` as `layer.tensors` describes them, read into `memory`."""
        names = [f"{layer.name}.{tensor.name}" for tensor in layer.tensors]
        sources = [self._sources[name, expert] for name in names]
        weights = [source.ordered() for source in sources]
        read = shards.read([[s for w in ordered.values() for s in w.parts] for ordered in weights], memory)
        made = {}
        for tensor, name, source, ordered in zip(layer.tensors, names, sources, weights, strict=True):
            stored = iter(read.pop(0))
            parts = {pattern: w.decode([next(stored) for _ in w.parts]) for pattern, w in ordered.items()}
            weight = self._convert(name, source, parts)
            if layer.transposed and weight.dim() == 2:
                weight = weight.T
            made[tensor.name] = weight.contiguous()
        return made

    def pieces(self, layer: MoELayer, expert: int) -> dict[str, list[Weight]]:
        """For each tensor of `expert`, the stored weights whose concatenated rows are the tensor.

        Weights are [rows, ...], or [1, rows, ...] if experts are packed. Their dimensions are in the model's
        order, which is the reverse of the tensor's if `layer.transposed`. Raises CheckpointError if
        transformers does more than concatenate them.
        """
        pieces = {}
        for tensor in layer.tensors:
            source = self._sources[f"{layer.name}.{tensor.name}", expert]
            operations = [] if source.converter is None else list(source.converter.operations)
            if source.row is None and operations and type(operations[0]).__name__ == "MergeModulelist":
                operations.pop(0)
            joined = len(operations) == 1 and type(operations[0]).__name__ == "Concatenate"
            if operations and not (joined and operations[0].dim == 1):
                raise CheckpointError(
                    f"{layer.name}.{tensor.name} is not stored as the model keeps it, so its experts "
                    'cannot be read in place; use another format than experts="native"'
                )
            pieces[tensor.name] = list(source.ordered().values())
        return pieces

    def _convert(self, name: str, source: ExpertSource, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the converter on one expert as if it were the layer's only one; drop the expert dimension."""
        if source.converter is None:
            (packed,) = parts.values()
            return packed[0]
        operations = list(source.converter.operations)
        converted: Any = dict(parts)
        if source.row is None:
            # Stacking one expert's tensor only adds the expert dimension; unsqueeze does it without a copy.
            if type(operations[0]).__name__ != "MergeModulelist" or operations.pop(0).dim != 0:
                raise CheckpointError(f"{name} is stored in a way that cannot be read one expert at a time")
            converted = {pattern: part.unsqueeze(0) for pattern, part in parts.items()}
        if len(operations) == 1 and (whole := _joined(operations[0], list(converted.values()))) is not None:
            return whole[0]
        for operation in operations:
            converted = operation.convert(
                converted,
                source_patterns=source.converter.source_patterns,
                target_patterns=source.converter.target_patterns,
                full_layer_name=name,
                model=_OneExpert(self._parameters),
                config=None,
                missing_keys=None,
            )
        (made,) = converted.values()
        weight: torch.Tensor = made[0] if isinstance(made, list) else made
        return weight[0]

    def _check(self, layer: MoELayer, remedy: str) -> None:
        """Raise CheckpointError unless every expert is complete and its converted shapes are right.

        Conversion is tried on the meta device, once for each combination of stored shapes and formats.
        """
        seen: set[tuple[object, ...]] = set()
        for tensor in layer.tensors:
            name = f"{layer.name}.{tensor.name}"
            for expert in range(layer.num_experts):
                source = self._sources.get((name, expert))
                absent = None if source is None else source.absent(expert)
                if source is None or absent:
                    what = absent or tensor.name
                    raise CheckpointError(f"expert {expert} of {layer.name}: {what} is missing; {remedy}")
                form = (tensor.name, *((p.shape, p.format, p.parts[0].dtype) for p in source.parts.values()))
                if form not in seen:
                    for part in source.parts.values():
                        part.check(remedy)
                    self._check_shape(name, expert, source)
                    seen.add(form)

    def _check_shape(self, name: str, expert: int, source: ExpertSource) -> None:
        wanted = self._parameters[name][1:]
        parts = {}
        for pattern, part in source.parts.items():
            shape = part.shape if source.row is None else (1, *part.shape[1:])
            parts[pattern] = torch.empty(shape, dtype=part.dtype, device="meta")
        try:
            found: object = tuple(self._convert(name, source, parts).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            found = f"parts that do not go together ({error})"
        if found != wanted:
            stored = ", ".join(f"{part.key} {list(part.shape)}" for part in source.parts.values())
            raise CheckpointError(
                f"{stored}: expert {expert} of {name} should be {list(wanted)} by config.json and comes out "
                f"as {list(found) if isinstance(found, tuple) else found}; config and weights do not match"
            )


def _joined(operation: Any, parts: Sequence[Any]) -> torch.Tensor | None:
    """The result of `operation` as a view if it concatenates parts that are adjacent in memory, else None."""
    if type(operation).__name__ != "Concatenate" or not all(isinstance(part, torch.Tensor) for part in parts):
        return None
    first, dim = parts[0], operation.dim
    if first.is_meta or dim < 0 or math.prod(first.shape[:dim]) != 1:
        return None
    end, shape = first.data_ptr(), [*first.shape[:dim], 0, *first.shape[dim + 1 :]]
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return None
        if part.shape[dim + 1 :] != first.shape[dim + 1 :]:
            return None
        end += part.nbytes
        shape[dim] += part.shape[dim]
    whole: torch.Tensor = first.as_strided(shape, first.stride())
    return whole


@dataclass(frozen=True, slots=True)
class _Match:
    """A stored weight found to belong to `parameter` of the model, by `pattern` of `converter` if any."""

    tensor: Weight
    parameter: str
    pattern: str | None
    converter: WeightConverter | None
    expert: int | None


class _OneExpert:
    """Stands in for the model when an operation asks for a parameter's shape: that of a single expert."""

    def __init__(self, parameters: Mapping[str, tuple[int, ...]]):
        self._parameters = parameters

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self._parameters[name][1:]), device="meta")


def _matches(model: Any, state: dict[str, torch.Tensor], tensors: Iterable[Weight]) -> Iterator[_Match]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    tensors = list(tensors)
    packed = [tensor for tensor in tensors if expert_part(tensor.key)]
    if packed:
        yield from _gguf_matches(model, packed)
    tensors = [tensor for tensor in tensors if not expert_part(tensor.key)]
    rules = [*get_model_conversion_mapping(model), *conversion_rules(model)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    for tensor in tensors:
        parameter, pattern = rename_source_key(tensor.key, renamings, converters, prefix, state)
        if parameter not in state and tensor.key in state:
            parameter, pattern = rename_source_key(tensor.key, [], [], prefix, state)
        expert = None
        if pattern is not None and "*" in pattern:
            expert = _expert_number(pattern, tensor.key, renamings)
        yield _Match(tensor, parameter, pattern, by_pattern[pattern] if pattern else None, expert)


def _gguf_matches(model: Any, weights: Iterable[Weight]) -> Iterator[_Match]:
    """Matches for GGUF's packed experts, most of which have gate and up in separate tensors."""
    from transformers.core_model_loading import Concatenate, WeightConverter

    layers = {layer_number(name): (name, experts) for name, experts in experts_modules(model)}
    converters: dict[str, WeightConverter] = {}
    for weight in weights:
        found = expert_part(weight.key)
        assert found is not None
        layer, parameter, part = found
        if layer not in layers:
            continue
        name, experts = layers[layer]
        parameter = f"{name}.{parameter}"
        if parameter not in converters:
            operation = _Interleave() if experts.is_transposed else Concatenate(dim=1)
            converters[parameter] = WeightConverter(expert_parts(part), parameter, [operation])
        yield _Match(weight, parameter, part, converters[parameter], None)


class _Interleave:
    """gpt-oss: rows of gate and up alternate, and matrices are [in, out]. The converter had taken them apart.

    For `WeightConverter`, in the place of transformers' operations. Returns a transposed view.
    """

    def convert(
        self,
        parts: Mapping[str, torch.Tensor],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Weights [E, out, in], or biases [E, out] -> alternating rows: [E, in, n out], or [E, n out]."""
        joined = torch.stack([parts[pattern] for pattern in source_patterns], dim=2).flatten(1, 2)
        return {target_patterns[0]: joined.transpose(1, 2) if joined.dim() == 3 else joined}


def _expert_number(pattern: str, key: str, renamings: Iterable[WeightRenaming]) -> int | None:
    """The number at the star of `pattern`, which is a pattern for keys to which renamings were applied."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    found = re.search(pattern.replace("*.", r"(\d+)\."), key)
    return int(found[1]) if found else None


def _add(found: dict[tuple[str, int], ExpertSource], match: _Match, num_experts: int) -> None:
    """Add one weight to the sources of its expert or, if it holds packed experts, of all experts."""
    packed = match.expert is None
    if packed and (not match.tensor.shape or match.tensor.shape[0] != num_experts):
        raise CheckpointError(
            f"{match.tensor.key} has shape {list(match.tensor.shape)} but config.json speaks of "
            f"{num_experts} experts; config and weights do not match"
        )
    experts: Sequence[int] = range(num_experts) if match.expert is None else [match.expert]
    for expert in experts:
        if expert >= num_experts:
            raise CheckpointError(
                f"{match.tensor.key} is there but config.json speaks of {num_experts} experts; "
                "config and weights do not match"
            )
        source = found.setdefault(
            (match.parameter, expert), ExpertSource(match.converter, expert if packed else None)
        )
        source.parts[match.pattern or ""] = match.tensor
