"""A pipeline of three stages: while one expert is encoded, the next is read and the previous one is written.

All stages keep the order of the plans. So when an expert fails, all earlier experts have been written, and
all shards that they complete are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch

from moe_local.offload.expert_file.expert_shard import ShardPlan, ShardWriter
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.system.direct_io import Memory, PageArena, page_memory

Tensors = Mapping[str, torch.Tensor]

Read = Callable[[ShardPlan, int, Memory], Tensors]
"""Reads expert `n` of a plan into memory that is reused two experts later. Called in a separate thread."""

Encode = Callable[[ShardPlan, int, Tensors, torch.Tensor], None]
"""Encodes expert `n` of a plan into its buffer, uint8 [its layout's nbytes], in the caller's thread."""

Written = Callable[[Layout], None]
"""Called, in order, after each expert was written, in the caller's thread."""


def write_shards(
    plans: Sequence[ShardPlan], folder: Path, read: Read, encode: Encode, written: Written
) -> list[tuple[int, ...]]:
    """Write the shards of all plans; returns the checksums of each.

    Memory: two experts as read and two encoded. Raises what the three functions do, and as ShardWriter.
    """
    if not plans:
        return []
    filled: SimpleQueue[torch.Tensor | None] = SimpleQueue()
    free: SimpleQueue[tuple[torch.Tensor, Layout | None] | None] = SimpleQueue()
    largest = max(layout.nbytes for plan in plans for layout in plan.layouts)
    for _ in range(2):
        free.put((page_memory(largest), None))
    with ThreadPoolExecutor(1, "read-experts") as reader, ThreadPoolExecutor(1, "write-experts") as writer:
        result = writer.submit(_write, plans, folder, filled, free)
        try:
            for plan, expert, tensors in _read_ahead(plans, read, reader):
                if (emptied := free.get()) is None:
                    break  # the writer failed; result.result() raises its error
                buffer = _tell(emptied, written)
                encode(plan, expert, tensors, buffer[: plan.layouts[expert].nbytes])
                del tensors
                filled.put(buffer)
        finally:
            filled.put(None)
        checksums = result.result()
    while (emptied := free.get()) is not None:
        _tell(emptied, written)
    return checksums


def _tell(emptied: tuple[torch.Tensor, Layout | None], written: Written) -> torch.Tensor:
    """Report what was written from a buffer, if anything; returns the buffer."""
    buffer, layout = emptied
    if layout is not None:
        written(layout)
    return buffer


def _read_ahead(
    plans: Sequence[ShardPlan], read: Read, reader: ThreadPoolExecutor
) -> Iterator[tuple[ShardPlan, int, Tensors]]:
    """Each expert, while the next is read. The caller must drop its tensors before it asks for the next."""
    experts = [(plan, expert) for plan in plans for expert in range(len(plan.layouts))]
    memories = PageArena(), PageArena()
    coming = reader.submit(read, *experts[0], memories[0])
    for number, (plan, expert) in enumerate(experts, 1):
        tensors = coming.result()
        if number < len(experts):
            memory = memories[number % 2]
            memory.reset()
            coming = reader.submit(read, *experts[number], memory)
        yield plan, expert, tensors
        del tensors


def _write(
    plans: Sequence[ShardPlan],
    folder: Path,
    filled: SimpleQueue[torch.Tensor | None],
    free: SimpleQueue[tuple[torch.Tensor, Layout | None] | None],
) -> list[tuple[int, ...]]:
    """The writer thread: buffers come through `filled` and return through `free`; None ends either queue."""
    checksums: list[tuple[int, ...]] = []
    try:
        for plan in plans:
            with ShardWriter(plan, folder) as shard:
                for layout in plan.layouts:
                    buffer = filled.get()
                    if buffer is None:
                        return checksums
                    shard.add(buffer[: layout.nbytes].numpy().data)
                    free.put((buffer, layout))
                checksums.append(shard.finish())
    finally:
        free.put(None)
    return checksums
