"""How much each format of each expert harms a model: what formats are chosen by, kept as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_local.cache.errors import ExpertFileError
from moe_local.cache.files import parse_json, write_atomically
from moe_local.offload.allocation.expected import NATS_PER_ERROR

VERSION = 1

EVEN = 0.1
"""Share of each layer's uses that is taken to be spread evenly: what a text hardly uses, another may."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One MoE layer; the sequences are indexed by expert."""

    gain: float
    """Harm for each unit of squared error in the layer's routed output, relative to that output."""
    uses: tuple[float, ...]
    """Share of tokens that chose the expert; K in all."""
    errors: Mapping[str, tuple[float, ...]]
    """By format, the squared error of one use on average, relative to the layer's output."""

    def use(self, expert: int) -> float:
        """The expert's share of tokens, EVEN of it spread over the layer."""
        return (1 - EVEN) * self.uses[expert] + EVEN * sum(self.uses) / len(self.uses)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of one checkpoint. Measured on a text, harm is KL divergence in nats a token; without one, the share of
    the routed output's energy that is wrong, on average over layers, the first weighing more."""

    model: str
    fingerprint: str
    """The checkpoint's."""
    text: str | None
    """Names the text and how much of it was read; None: there was none."""
    tokens: int
    layers: tuple[LayerSensitivity, ...]

    @property
    def nats(self) -> float:
        """What a unit of harm is in nats a token: without a text, by what is known of one model. The three
        matrices of an expert err alike, and their errors add up in its answer."""
        return 1.0 if self.text is not None else NATS_PER_ERROR / 3

    def harm(self, layer: int, expert: int, format: str) -> float:
        """What is expected of having this one expert in `format`; harms of several add up."""
        found = self.layers[layer]
        return found.gain * found.use(expert) * found.errors[format][expert]

    def expected(self, formats: Sequence[Sequence[str]]) -> float:
        """The harm of an assignment, formats[layer][expert]."""
        return math.fsum(
            self.harm(layer, expert, format)
            for layer, row in enumerate(formats)
            for expert, format in enumerate(row)
        )

    def measured(self, formats: Sequence[str]) -> bool:
        """Whether all of these formats have been measured, in every layer."""
        return all(set(formats) <= set(layer.errors) for layer in self.layers)

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
            if any(len(errors) != len(layer.uses) for errors in layer.errors.values()):
                raise ValueError("a layer with errors of more or fewer experts than it has")
        return cls(fields["model"], fields["fingerprint"], fields["text"], int(fields["tokens"]), layers)

    def save(self, path: Path) -> None:
        """Replace the file at `path`, whole. Raises ExpertFileError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [json.dumps(self.to_dict()), "\n"])
        except OSError as error:
            raise ExpertFileError(
                f"{path} cannot be written ({error.strerror}); free the disk, or set MOE_LOCAL_HOME"
            ) from error

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> Sensitivity | None:
        """What is kept at `path`, of the checkpoint with this fingerprint; None if there is none, or it is
        damaged, of another version or another checkpoint: it is measured again then."""
        try:
            found = cls.from_dict(parse_json(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if found.fingerprint == fingerprint else None
