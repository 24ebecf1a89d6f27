"""Attention of many queries on a CPU, in blocks of queries, each to no more keys than its mask shows it.

torch's kernel skips what is hidden only for queries of as many keys (is_causal). Behind a mask it multiplies
all queries with all keys: those of the tokens to come, and those that a sliding window has left behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 512
"""Queries in a block, and what its first key is a multiple of: the keys that the kernel takes at a time, so
that it adds up most numbers as without blocks. 128 and 256 save little more, or less behind long rows."""


def query_blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> list[tuple[slice, slice]]:
    """For each block of query [B, H, T, D], its queries and the keys of key [B, H / G, S, D] that one of them
    sees by `mask`, [B, 1, T, S], bool (True: seen); one block of all for other masks and none.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None or query.is_cuda or mask.dtype != torch.bool or mask.shape[2:] != (queries, keys):
        return [(slice(None), slice(None))]
    return list(_blocks(mask, queries, keys))


def _blocks(mask: torch.Tensor, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, queries, BLOCK):
        rows = slice(start, start + BLOCK)
        seen = mask[:, :, rows].flatten(0, 2).any(0).nonzero()
        if len(seen) == 0:  # padding alone
            yield rows, slice(keys)
        else:
            yield rows, slice(int(seen[0]) // BLOCK * BLOCK, int(seen[-1]) + 1)
