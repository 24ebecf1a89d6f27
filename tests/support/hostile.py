"""Malicious files: hypothesis strategies that damage valid ones."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

from hypothesis import strategies as st

HUGE = [0, 1, -1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, -(2**63), 10**400, 0.5, 1e308]
ODD = [None, True, "", "..", "../../etc/passwd", "a\0b", "\ud800", "x\ny", [], {}, [[]], {"a": 1}, "1" * 5000]


def values() -> st.SearchStrategy[Any]:
    """Values that replace a sensible one in a JSON file."""
    return st.one_of(st.sampled_from(HUGE), st.sampled_from(ODD), st.integers(), st.text(max_size=8))


@st.composite
def damaged_bytes(draw: st.DrawFn, honest: bytes, reach: int) -> bytes:
    """A valid file with changes within its first `reach` bytes: bytes changed, inserted or removed, or the
    file cut off."""
    data = bytearray(honest)
    for _ in range(draw(st.integers(1, 4))):
        # The first bytes are damaged most often, since most errors can be made there.
        at = draw(st.one_of(st.integers(0, min(64, reach)), st.integers(0, reach)))
        change = draw(st.sampled_from(["flip", "write", "number", "insert", "remove", "cut"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "write":
            data[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif change == "number":
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 2**31, 2**40, 2**63, 2**64 - 1])))
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, honest: Any) -> Any:
    """A valid JSON document with values replaced, removed or renamed, anywhere in the tree."""
    tree = json.loads(json.dumps(honest))
    for _ in range(draw(st.integers(1, 3))):
        choose = random.Random(draw(st.integers(0, 2**32)))
        parent = tree
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = choose.choice(keys)
            if isinstance(parent[key], dict | list) and choose.random() < 0.8:
                parent = parent[key]
                continue
            change = choose.choice(["replace", "replace", "replace", "remove", "rename"])
            if change == "replace":
                parent[key] = copy.deepcopy(draw(values()))  # a later change may modify it
            elif change == "remove":
                del parent[key]
            elif isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(key)
            break
    return tree


def nested(depth: int) -> bytes:
    """JSON of `depth` nested empty lists."""
    return b"[" * depth + b"]" * depth


def as_json(tree: Any) -> bytes:
    """The tree as JSON bytes, even if it holds values that neither JSON nor UTF-8 allows."""
    return json.dumps(tree).encode()
