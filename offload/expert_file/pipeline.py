"""Three things at once: the next expert is read while one is encoded and the one before is written.

Everything keeps the order of the plans, however long it takes: whatever fails, fails with all earlier experts
written and all shards kept that they complete.
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
"""Expert `n` of a plan, read into memory that is used again two experts later. In a thread of its own."""

Encode = Callable[[ShardPlan, int, Tensors, torch.Tensor], None]
"""Writes expert `n` of a plan into its buffer, uint8 [its layout's nbytes]. In the caller's thread."""

Written = Callable[[Layout], None]
"""Told of each expert, in order, that it has been written. In the caller's thread."""


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
                    break  # the writer failed, which its result says
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
    """The buffer, once it has been told what was written from it."""
    buffer, layout = emptied
    if layout is not None:
        written(layout)
    return buffer


def _read_ahead(
    plans: Sequence[ShardPlan], read: Read, reader: ThreadPoolExecutor
) -> Iterator[tuple[ShardPlan, int, Tensors]]:
    """Each expert, the one after it being read meanwhile. It must be let go before the next is asked for."""
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
    """The writer: buffers come through `filled` and go back through `free`; None ends either."""
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
