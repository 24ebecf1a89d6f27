"""How much each format of each expert harms a model: the figures that formats are chosen by, in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_local.cache.errors import ExpertFileError
from moe_local.cache.files import parse_json, write_atomically
from moe_local.offload.allocation.expected import NATS_PER_ERROR

if TYPE_CHECKING:
    from moe_local.offload.checkpoint.spec import ModelSpec

VERSION = 1

MOST = 1e100
"""Figures must be below this; larger ones cannot come from a model."""

EVEN = 0.1
"""Share of each layer's uses that is assumed to be spread evenly: experts that one text hardly uses may be
used more by another."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One MoE layer; the sequences are indexed by expert."""

    gain: float
    """Harm for each unit of squared error in the layer's routed output, relative to that output."""
    uses: tuple[float, ...]
    """Share of tokens that chose each expert; the sum is the layer's top-k."""
    errors: Mapping[str, tuple[float, ...]]
    """By format, the average squared error of one use, relative to the layer's output."""

    def use(self, expert: int) -> float:
        """The expert's share of tokens, after spreading EVEN of all uses evenly over the layer."""
        return (1 - EVEN) * self.uses[expert] + EVEN * sum(self.uses) / len(self.uses)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The sensitivity of one checkpoint. Measured on a text, harm is KL divergence in nats a token; without a
    text, it is the error's share of the routed output's energy, averaged over layers, of which the first
    weigh more."""

    model: str
    fingerprint: str
    """The checkpoint's fingerprint."""
    text: str | None
    """Name of the text and of how much of it was read; None if there was none."""
    tokens: int
    layers: tuple[LayerSensitivity, ...]

    @property
    def nats(self) -> float:
        """Nats a token for each unit of harm; without a text, from figures of one model (NATS_PER_ERROR). The
        three matrices of an expert have equal errors, which add up in its output."""
        return 1.0 if self.text is not None else NATS_PER_ERROR / 3

    def harm(self, layer: int, expert: int, format: str) -> float:
        """The expected harm of having this one expert in `format`; harms of several add up."""
        found = self.layers[layer]
        return found.gain * found.use(expert) * found.errors[format][expert]

    def expected(self, formats: Sequence[Sequence[str]]) -> float:
        """The expected harm of an assignment, formats[layer][expert]."""
        return math.fsum(
            self.harm(layer, expert, format)
            for layer, row in enumerate(formats)
            for expert, format in enumerate(row)
        )

    def measured(self, formats: Sequence[str]) -> bool:
        """Whether all of these formats have been measured, in every layer."""
        return all(set(formats) <= set(layer.errors) for layer in self.layers)

    def is_of(self, spec: ModelSpec) -> bool:
        """Whether it covers every layer and expert of a model of this shape; if not, it is damaged."""
        return [len(layer.uses) for layer in self.layers] == [layer.num_experts for layer in spec.layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']!r}")
        layers = tuple(
            LayerSensitivity(
                float(layer["gain"]),
                tuple(map(float, layer["uses"])),
                {str(name): tuple(map(float, errors)) for name, errors in layer["errors"].items()},
            )
            for layer in fields["layers"]
        )
        for layer in layers:
            if not layer.uses or any(len(errors) != len(layer.uses) for errors in layer.errors.values()):
                raise ValueError("a layer with errors of more or fewer experts than it has")
            figures = (layer.gain, *layer.uses, *(error for row in layer.errors.values() for error in row))
            if not all(0 <= figure < MOST for figure in figures):
                raise ValueError("a figure below 0 or beyond measure")
        text = None if fields["text"] is None else str(fields["text"])
        return cls(str(fields["model"]), str(fields["fingerprint"]), text, int(fields["tokens"]), layers)

    def save(self, path: Path) -> None:
        """Replace the file at `path` atomically. Raises ExpertFileError if it cannot be written."""
        with unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [json.dumps(self.to_dict()), "\n"])

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> Sensitivity | None:
        """The Sensitivity stored at `path`; None if there is none, or if it is damaged, of another version,
        or of a checkpoint with another fingerprint: the caller then measures again."""
        try:
            found = cls.from_dict(parse_json(path.read_bytes()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            return None
        return found if found.fingerprint == fingerprint else None


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turn an OSError in the block, which writes `path`, into an ExpertFileError."""
    try:
        yield
    except OSError as error:
        raise ExpertFileError(
            f"{path} cannot be written ({error.strerror}); free the disk, or set MOE_LOCAL_HOME"
        ) from error
