"""Verifies an expert file: reads every expert at the disk's speed and compares its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from moe_local.cache.errors import ExpertFileError
from moe_local.offload.expert_file.expert_file import ExpertFile, Progress, StoredLayer
from moe_local.offload.expert_file.expert_shard import ShardPlan
from moe_local.offload.system.direct_io import Range, ReadError, page_memory, read_ranges
from moe_local.offload.system.hung import HungError

BATCH = 64 << 20
"""Bytes read at a time, so that small experts keep the disk busy as well."""

WRONG = "wrong checksum"
HEADER = "its header is damaged"


class Damage(NamedTuple):
    """A damaged expert or, if `expert` is None, a shard whose header or length is damaged."""

    layer: int
    expert: int | None
    name: str
    """The routed-experts module's path in the model."""
    path: Path
    what: str

    def __str__(self) -> str:
        place = f"MoE layer {self.layer} ({self.name})"
        if self.expert is not None:
            place = f"expert {self.expert} of {place}"
        return f"{place}: {self.what} in {self.path.name}"


class _Expert(NamedTuple):
    layer: int
    expert: int
    stored: StoredLayer

    @property
    def nbytes(self) -> int:
        return self.stored.layouts[self.expert].nbytes


def find_damage(file: ExpertFile, progress: Progress | None = None) -> list[Damage]:
    """All damage in the shards of `file`, by layer and expert.

    Reads past the page cache where the system allows it. Memory: twice BATCH and the largest expert.
    Shards may be missing or of a wrong size (`read_manifest` opens such a file). Raises ExpertFileError for a
    disk that does not answer, and nothing else.
    """
    done = done_bytes = 0

    def told(nbytes: int) -> None:
        nonlocal done, done_bytes
        done, done_bytes = done + 1, done_bytes + nbytes
        if progress is not None:
            progress(done, file.total_experts, done_bytes)

    found = damaged_experts(file.layers, told)
    for layer, stored in enumerate(file.layers):
        plan = ShardPlan(file.fingerprint, file.format, layer, stored.name, stored.layouts)
        if what := damaged_frame(plan, stored):
            found.append(Damage(layer, None, stored.name, stored.path, what))
    return sorted(found, key=lambda damage: (damage.layer, -1 if damage.expert is None else damage.expert))


def damaged_experts(
    layers: Sequence[StoredLayer], told: Callable[[int], None], first: int = 0
) -> list[Damage]:
    """The experts of these shards that cannot be read or have another checksum, in order.

    `first` is the number of the first layer; `told` is called with each expert's size after its comparison.
    Raises as `find_damage`.
    """
    found: list[Damage] = []
    for batch, buffer, unread in _read_ahead(list(_batches(layers, first))):
        at = 0
        for expert in batch:
            view = buffer[at : at + expert.nbytes].numpy().data
            at += expert.nbytes
            what = unread.get(expert.expert) if unread else None
            if what is None and xxhash.xxh3_64_intdigest(view) != expert.stored.checksums[expert.expert]:
                what = WRONG
            if what is not None:
                found.append(
                    Damage(expert.layer, expert.expert, expert.stored.name, expert.stored.path, what)
                )
            told(expert.nbytes)
    return found


def damaged_frame(plan: ShardPlan, stored: StoredLayer) -> str | None:
    """What is wrong with the shard's size or header, if anything."""
    header = plan.header(stored.checksums)
    try:
        size = stored.path.stat().st_size
        with open(stored.path, "rb") as file:
            same = file.read(len(header)) == header
    except OSError as error:
        return f"{error.strerror}"
    if size != stored.nbytes:
        return f"{size} bytes instead of {stored.nbytes}"
    return None if same else HEADER


def _batches(layers: Sequence[StoredLayer], first: int) -> Iterator[list[_Expert]]:
    """Batches of consecutive experts of one shard; a batch ends once it has BATCH bytes."""
    for layer, stored in enumerate(layers, first):
        batch: list[_Expert] = []
        for expert in range(len(stored.layouts)):
            batch.append(_Expert(layer, expert, stored))
            if sum(known.nbytes for known in batch) >= BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _read_ahead(
    batches: Sequence[list[_Expert]],
) -> Iterator[tuple[list[_Expert], torch.Tensor, dict[int, str]]]:
    """Each batch, its bytes, and why some of its experts could not be read; the next is read meanwhile."""
    if not batches:
        return
    size = max(sum(expert.nbytes for expert in batch) for batch in batches)
    buffers = page_memory(size), page_memory(size)
    with ThreadPoolExecutor(1, "verify") as reader:
        coming = reader.submit(_fill, batches[0], buffers[0])
        for number, batch in enumerate(batches, 1):
            unread = coming.result()
            if number < len(batches):
                coming = reader.submit(_fill, batches[number], buffers[number % 2])
            yield batch, buffers[(number - 1) % 2], unread


def _fill(batch: Sequence[_Expert], buffer: torch.Tensor) -> dict[int, str]:
    """Read a batch; returns the experts that could not be read, and why."""
    ranges, at = [], 0
    for expert in batch:
        start = expert.stored.offsets[expert.expert]
        ranges.append(Range(expert.stored.path, start, buffer[at : at + expert.nbytes]))
        at += expert.nbytes
    unread = {}
    try:
        with suppress(ReadError):
            read_ranges(ranges)
            return {}
        for expert, found in zip(batch, ranges, strict=True):
            try:
                read_ranges([found])
            except ReadError as error:
                cause = error.__cause__
                unread[expert.expert] = str(cause.strerror if isinstance(cause, OSError) else error)
    except HungError as error:
        raise ExpertFileError(f"{error.path} {error}") from error
    return unread
