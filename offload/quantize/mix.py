"""A format for each expert: parsing `experts="mixed:3.5"`, and the assignment of formats to experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from moe_local.cache.errors import ExpertFileError, OptionError
from moe_local.offload.quantize.codec import codec_for, codecs
from moe_local.offload.quantize.layout import Layout, TensorSpec

if TYPE_CHECKING:
    from moe_local.offload.checkpoint.spec import ModelSpec

AUTO = "auto"
"""As many bits as fit the memory budget; becomes "mixed:BITS" once that is known."""

MIXED = "mixed"

_REMEDY = "make it anew: moe-local convert MODEL --experts"


def is_mixed(experts: str) -> bool:
    """Whether `experts`, in canonical spelling, asks for a format per expert: "auto" or "mixed:BITS"."""
    return experts == AUTO or experts.startswith(f"{MIXED}:")


def canonical(experts: str) -> str:
    """The canonical spelling of a user's option: "mixed:3.50" -> "mixed:3.5"; all other strings unchanged.

    Raises OptionError for "mixed" without a number of bits above 0.
    """
    if experts.partition(":")[0] != MIXED:
        return experts
    match = re.fullmatch(rf"{MIXED}:(\d{{1,3}}(?:\.\d*)?|\.\d+)", experts)
    if match is None or not float(match[1]):
        raise OptionError(
            f"experts {experts!r} is not an average number of bits; write for example {MIXED}:3.5, or {AUTO}"
        )
    return name_of(float(match[1]))


def name_of(bits: float) -> str:
    """The name of experts with so many bits on average, which is rounded to three decimals."""
    return f"{MIXED}:{bits:.3f}".rstrip("0").rstrip(".")


def bits_asked(experts: str) -> float:
    """The average bits that a canonical "mixed:BITS" asks for."""
    return float(experts.partition(":")[2])


def bits_range(spec: ModelSpec, formats: Sequence[str] | None = None) -> tuple[float, float]:
    """The least and the most average bits per weight that `formats` (None: all codecs) give this model."""
    found = [
        uniform_bytes(spec, name) * 8 / spec.expert_numel
        for name in (codecs() if formats is None else formats)
    ]
    return min(found), max(found)


def check_bits(
    experts: str, spec: ModelSpec, model: str = "this model", formats: Sequence[str] | None = None
) -> float:
    """The bits that a canonical "mixed:BITS" asks for. Raises OptionError if `formats` cannot give that."""
    asked = bits_asked(experts)
    least, most = bits_range(spec, formats)
    if not least <= asked <= most:
        raise OptionError(
            f"experts {experts!r} asks for {asked:g} bits a weight on average, which no formats give; "
            f"for {model} use {MIXED}:{_up(least):g} to {MIXED}:{int(most * 1000) / 1000:g}"
        )
    return asked


def _up(bits: float) -> float:
    """Rounded up to the three decimals of a name."""
    return -int(-bits * 1000 // 1) / 1000


def uniform_bytes(spec: ModelSpec, format: str) -> int:
    """Bytes of all routed experts in one format."""
    return sum(layer.num_experts * layout_of(format, layer.tensors).nbytes for layer in spec.layers)


@lru_cache(maxsize=1024)
def layout_of(format: str, tensors: tuple[TensorSpec, ...]) -> Layout:
    """The layout of an expert with these tensors in `format`; the same object for equal arguments."""
    return codec_for(format).layout(tensors)


@dataclass(frozen=True, slots=True)
class Mix:
    """Which format each routed expert of a model has. Checked when it is made.

    Raises ExpertFileError for an unknown format, a layer without experts, or a name that is not canonical.
    """

    name: str
    """The name in `experts=`, in canonical spelling: "mixed:3.5"."""
    formats: tuple[tuple[str, ...], ...]
    """`formats[layer][expert]`, names of codecs; layers count MoE layers."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(rf"{MIXED}:[\d.]+", self.name):
            raise ExpertFileError(f"a mix is called {self.name!r}, which is not {MIXED}:BITS; {_REMEDY}")
        if canonical(self.name) != self.name:
            raise ExpertFileError(f"mix {self.name} should be called {canonical(self.name)}; {_REMEDY}")
        if not self.formats or not all(self.formats):
            raise ExpertFileError(f"mix {self.name} has a layer without experts; {_REMEDY}")
        known = codecs()
        for layer, formats in enumerate(self.formats):
            for expert, format in enumerate(formats):
                if format not in known:
                    raise ExpertFileError(
                        f"mix {self.name} has expert {expert} of MoE layer {layer} in format {format!r}; "
                        f"known are {', '.join(known)}; use the moe-local that made it, or {_REMEDY}"
                    )

    def check(self, spec: ModelSpec, model: str = "the model") -> Mix:
        """Returns this mix. Raises ExpertFileError unless it is for a model of this shape."""
        mine, its = [len(layer) for layer in self.formats], [layer.num_experts for layer in spec.layers]
        if mine != its:
            raise ExpertFileError(
                f"mix {self.name} is for {_shape(mine)}, {model} has {_shape(its)}; {_REMEDY} {self.name}"
            )
        return self

    def layouts(self, spec: ModelSpec) -> tuple[tuple[Layout, ...], ...]:
        """`layouts[layer][expert]`; equal layouts are the same object. Raises like `check`."""
        self.check(spec)
        return tuple(
            tuple(layout_of(format, layer.tensors) for format in formats)
            for layer, formats in zip(spec.layers, self.formats, strict=True)
        )

    def nbytes(self, spec: ModelSpec) -> int:
        """Bytes of all routed experts, scales and padding included."""
        return sum(layout.nbytes for layer in self.layouts(spec) for layout in layer)

    def bits(self, spec: ModelSpec) -> float:
        """Average bits per weight, with all bytes counted."""
        return 8 * self.nbytes(spec) / spec.expert_numel

    def counts(self) -> dict[str, int]:
        """How many experts have each format, in the order of `codecs`."""
        every = [format for layer in self.formats for format in layer]
        return {name: every.count(name) for name in codecs() if name in every}


def even_mix(experts: str, spec: ModelSpec, formats: Sequence[str] | None = None) -> Mix:
    """A mix for plans, made without the weights: of the two formats nearest to the bits asked for, the larger
    one is spread evenly over the experts. Never takes more bytes than asked for. `formats`: None for those
    worth choosing from. Raises like `check_bits`.
    """
    if formats is None:
        from moe_local.offload.allocation.expected import candidates  # measures codecs, once

        formats = candidates(spec.dtype)
    bits = check_bits(experts, spec, formats=formats)
    budget = int(bits * spec.expert_numel / 8)
    total = {name: uniform_bytes(spec, name) for name in formats}
    low = max((name for name in total if total[name] <= budget), key=total.__getitem__)
    high = min((name for name in total if total[name] >= budget), key=total.__getitem__)
    share = (budget - total[low]) / max(1, total[high] - total[low])
    allowed, taken, mixed = 0.0, 0, []
    for layer in spec.layers:
        more = layout_of(high, layer.tensors).nbytes - layout_of(low, layer.tensors).nbytes
        chosen = []
        for _ in range(layer.num_experts):
            allowed += share * more
            larger = taken + more <= allowed
            taken += more if larger else 0
            chosen.append(high if larger else low)
        mixed.append(tuple(chosen))
    return Mix(experts, tuple(mixed))


def _shape(experts: Sequence[int]) -> str:
    counts = sorted(set(experts))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(experts)} layers of {each} experts"
