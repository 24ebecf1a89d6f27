"""The converted experts of one model on disk: a folder of shards and a manifest, opened for reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from moe_local.cache.errors import ExpertFileError
from moe_local.cache.files import parse_json
from moe_local.offload.checkpoint.files import is_file_name
from moe_local.offload.expert_file.expert_shard import VERSION, ShardPlan, write_durably
from moe_local.offload.quantize.layout import PAGE, Layout
from moe_local.offload.quantize.mix import Mix

MANIFEST = "manifest.json"

Progress = Callable[[int, int, int], None]
"""Called with experts done, experts in all, bytes done."""


class ExpertLocation(NamedTuple):
    """Where an expert's bytes lie; `offset` and `nbytes` are multiples of 4096."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One shard as the manifest describes it; the tuples are indexed by expert."""

    name: str
    """The routed-experts module's path in the model."""
    path: Path
    nbytes: int
    """Size of the file."""
    layouts: tuple[Layout, ...]
    offsets: tuple[int, ...]
    checksums: tuple[int, ...]


class ExpertFile:
    """Where every routed expert of a model lies on disk, and how. Immutable; holds no file open."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        name: str,
        model_type: str,
        format: str,
        layers: Sequence[StoredLayer],
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        """The fingerprint of the checkpoint that the experts come from."""
        self.name = name
        """The model's name when it was converted."""
        self.model_type = model_type
        self.format = format
        """The format asked for at conversion; a single expert's is `layout(layer, expert).format`."""
        self.layers = tuple(layers)

    @classmethod
    def open(cls, folder: Path, fingerprint: str | None = None, format: str | None = None) -> ExpertFile:
        """Read the manifest in `folder` and compare the shards' sizes; reads no expert.

        Raises ExpertFileError for a missing or damaged manifest, an unknown version, missing or truncated
        shards, and for another fingerprint or format than given.
        """
        folder = Path(folder)
        file = read_manifest(folder)
        if fingerprint is not None and file.fingerprint != fingerprint:
            raise ExpertFileError(
                f"{folder} was converted from another checkpoint (fingerprint {file.fingerprint[:16]}, "
                f"the model's is {fingerprint[:16]}); convert it again: moe-local convert MODEL"
            )
        if format is not None and file.format != format:
            raise ExpertFileError(
                f"{folder} holds {file.format} experts, not {format}; "
                "convert it again: moe-local convert MODEL"
            )
        file.check_integrity()
        return file

    @classmethod
    def finish(
        cls,
        folder: Path,
        name: str,
        model_type: str,
        plans: Sequence[ShardPlan],
        checksums: Sequence[Sequence[int]],
    ) -> ExpertFile:
        """Write the manifest of finished shards, given a plan and checksums for each, and open the file.

        The manifest comes last: a folder that has one is complete. Raises as `open`, or DoesNotFitError.
        """
        layers = [
            StoredLayer(
                plan.layer_name, folder / plan.file, plan.nbytes, plan.layouts, plan.offsets(), tuple(found)
            )
            for plan, found in zip(plans, checksums, strict=True)
        ]
        file = cls(folder, plans[0].fingerprint, name, model_type, plans[0].format, layers)
        file.check_integrity()
        write_durably(folder / MANIFEST, _manifest(file))
        return file

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def num_experts(self, layer: int) -> int:
        return len(self.layers[layer].layouts)

    @property
    def mix(self) -> Mix:
        """The format of each expert. Raises ExpertFileError if all were converted to one."""
        return Mix(self.format, tuple(tuple(each.format for each in layer.layouts) for layer in self.layers))

    @property
    def total_experts(self) -> int:
        return sum(len(layer.layouts) for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts, which is what they need in memory; headers and manifest come on top."""
        return sum(layout.nbytes for layer in self.layers for layout in layer.layouts)

    def layout(self, layer: int, expert: int) -> Layout:
        return self.layers[layer].layouts[expert]

    def nbytes(self, layer: int, expert: int) -> int:
        """Bytes of one expert, a multiple of 4096."""
        return self.layout(layer, expert).nbytes

    def location(self, layer: int, expert: int) -> ExpertLocation:
        stored = self.layers[layer]
        return ExpertLocation(stored.path, stored.offsets[expert], stored.layouts[expert].nbytes)

    def checksum(self, layer: int, expert: int) -> int:
        """xxh3_64 of the expert's bytes."""
        return self.layers[layer].checksums[expert]

    def read(self, layer: int, expert: int) -> bytearray:
        """One expert's checked bytes, in new memory. The slow, plain way.

        Raises ExpertFileError if they cannot be read or are damaged.
        """
        path, offset, nbytes = self.location(layer, expert)
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                found = bytearray(file.read(nbytes))
        except OSError as error:
            raise ExpertFileError(f"cannot read {path}: {error.strerror}; check the disk") from error
        if len(found) < nbytes or xxhash.xxh3_64_intdigest(found) != self.checksum(layer, expert):
            raise ExpertFileError(
                f"expert {expert} of MoE layer {layer} ({self.layers[layer].name}) in {path} is damaged "
                "(wrong checksum); check the disk, then repair it: moe-local verify MODEL --repair"
            )
        return found

    def check_integrity(self) -> None:
        """Raises ExpertFileError if a shard is missing or has another size than when it was written."""
        for layer in self.layers:
            size = layer.path.stat().st_size if layer.path.is_file() else None
            if size != layer.nbytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {layer.nbytes}"
                raise ExpertFileError(f"{layer.path} {found}; convert it again: moe-local convert MODEL")


def _manifest(file: ExpertFile) -> bytes:
    layouts = list(dict.fromkeys(layout for layer in file.layers for layout in layer.layouts))
    fields: dict[str, Any] = {
        "version": VERSION,
        "fingerprint": file.fingerprint,
        "name": file.name,
        "model_type": file.model_type,
        "format": file.format,
        "layouts": [layout.to_dict() for layout in layouts],
        "layers": [
            {
                "name": layer.name,
                "file": layer.path.name,
                "nbytes": layer.nbytes,
                "experts": [
                    {
                        "format": layout.format,
                        "layout": layouts.index(layout),
                        "offset": offset,
                        "nbytes": layout.nbytes,
                        "xxh3_64": f"{checksum:016x}",
                    }
                    for layout, offset, checksum in zip(
                        layer.layouts, layer.offsets, layer.checksums, strict=True
                    )
                ],
            }
            for layer in file.layers
        ],
    }
    return json.dumps(fields | {"checksum": checksum_of(fields)}, indent=1).encode()


def checksum_of(fields: Mapping[str, Any]) -> str:
    """Of the fields of a JSON file, without its checksum."""
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def read_manifest(folder: Path) -> ExpertFile:
    """The expert file in `folder`, without looking at its shards. Raises ExpertFileError for a missing or
    damaged manifest, or one of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ExpertFileError(
            f"{folder} has no {MANIFEST}, so it holds no finished conversion; "
            "start or continue it: moe-local convert MODEL"
        )
    damaged = ""
    try:
        fields = parse_json(path.read_bytes())
        version = fields["version"]
        if version == VERSION:
            if fields.pop("checksum") != checksum_of(fields):
                raise ValueError("wrong checksum")
            return _file(folder, fields)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        raise ExpertFileError(
            f"{path} is damaged ({' '.join(damaged.split())[:200]}); "
            "convert it again: moe-local convert MODEL"
        )
    raise ExpertFileError(
        f"{path} has version {repr(version)[:40]}, this moe-local reads version {VERSION}; "
        "use the moe-local that wrote it, or convert it again: moe-local convert MODEL"
    )


def _file(folder: Path, fields: dict[str, Any]) -> ExpertFile:
    """The expert file of a manifest's fields. Its checksum detects damage but not malice, so file names and
    offsets are checked."""
    layouts = [Layout.from_dict(layout) for layout in fields["layouts"]]
    layers = []
    for layer in fields["layers"]:
        if not is_file_name(layer["file"]):
            raise ValueError(f"a shard called {layer['file']!r}")
        stored = StoredLayer(
            str(layer["name"]),
            folder / layer["file"],
            layer["nbytes"],
            tuple(layouts[expert["layout"]] for expert in layer["experts"]),
            tuple(expert["offset"] for expert in layer["experts"]),
            tuple(int(expert["xxh3_64"], 16) for expert in layer["experts"]),
        )
        _check_places(stored)
        layers.append(stored)
    if not layers:
        raise ValueError("no layers")
    fingerprint, name, model_type, format = (
        str(fields[name]) for name in ("fingerprint", "name", "model_type", "format")
    )
    return ExpertFile(folder, fingerprint, name, model_type, format, layers)


def _check_places(layer: StoredLayer) -> None:
    """Raise ValueError unless every expert has its own whole pages within the shard."""
    end = 0
    for layout, offset, checksum in zip(layer.layouts, layer.offsets, layer.checksums, strict=True):
        if type(offset) is not int or offset < max(end, PAGE) or offset % PAGE or not 0 <= checksum < 2**64:
            raise ValueError(f"an expert at {offset!r} in {layer.path.name}")
        end = offset + layout.nbytes
    if type(layer.nbytes) is not int or end != layer.nbytes:
        raise ValueError(f"{layer.path.name} of {layer.nbytes!r} bytes for experts up to {end}")
