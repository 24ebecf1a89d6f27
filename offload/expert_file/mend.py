"""Repairs single damaged experts of a shard in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import xxhash

from moe_local.offload.expert_file.expert_file import StoredLayer
from moe_local.offload.expert_file.expert_shard import ShardPlan, disk_errors

Encoded = Callable[[int], memoryview]
"""Returns an expert's bytes, encoded again from its source; valid until the next call."""


def mend_shard(plan: ShardPlan, stored: StoredLayer, damaged: Sequence[int], encoded: Encoded) -> bool:
    """Restore these experts, the header and the length of the shard to what they were, in place.

    Only bytes with the checksum recorded at conversion are written, so a reader during the repair, or after
    it was killed, finds either the right bytes or ones that fail its checksum. Returns False if the source
    gives other bytes than at conversion, or the shard is gone: it then has to be converted again, and nothing
    wrong was written. Raises DoesNotFitError, ExpertFileError, and what `encoded` does.
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
