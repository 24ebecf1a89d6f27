"""Damaged experts of a shard written again in their places, where the rest of the shard is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import xxhash

from moe_local.offload.expert_file.expert_file import StoredLayer
from moe_local.offload.expert_file.expert_shard import ShardPlan, disk_errors

Encoded = Callable[[int], memoryview]
"""Gives an expert's bytes, encoded from its source again; valid until the next call."""


def mend_shard(plan: ShardPlan, stored: StoredLayer, damaged: Sequence[int], encoded: Encoded) -> bool:
    """Write these experts, the header and the end of the shard as they were.

    In place: what is written has the checksum that was noted when the file was made, so whoever reads
    meanwhile, or after a kill in the middle, finds the right bytes or ones that his checksum refuses. False
    where the source gives other bytes than it did then, or the shard is gone: it has to be made anew, and
    nothing wrong was written. Raises DoesNotFitError, ExpertFileError, and what `encoded` does.
    """
    if not stored.path.is_file():
        return False
    with disk_errors(stored.path, plan.nbytes):
        file = os.open(stored.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        for expert in damaged:
            data = encoded(expert)
            if xxhash.xxh3_64_intdigest(data) != stored.checksums[expert]:
                return False
            with disk_errors(stored.path, plan.nbytes):
                _write(file, data, stored.offsets[expert])
        with disk_errors(stored.path, plan.nbytes):
            header = plan.header(stored.checksums)
            os.lseek(file, 0, os.SEEK_SET)
            if os.read(file, len(header)) != header:
                _write(file, memoryview(header), 0)
            if os.fstat(file).st_size != plan.nbytes:
                os.ftruncate(file, plan.nbytes)
            os.fsync(file)
    finally:
        os.close(file)
    return True


def _write(file: int, data: memoryview, offset: int) -> None:
    os.lseek(file, offset, os.SEEK_SET)
    while data:
        data = data[os.write(file, data) :]
