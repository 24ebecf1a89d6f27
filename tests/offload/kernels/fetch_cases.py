"""The kernels that look experts up and bring them, in Triton's interpreter, against torch's operations.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import random

import pytest
import torch

from moe_local.offload.kernels.fetch import LOG_HEAD, LayerTables, TritonFetch, fetch_kernels
from support import torch_kernels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_interpreter")]

UNIT = 16


class Tables:
    """A layer's tables, and a list that may be old, short or in any order."""

    def __init__(self, experts: int, slots: int, top_k: int, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.top_k, self.experts = top_k, experts
        places = rng.sample(range(experts), rng.randint(0, slots))
        slot_of, expert_in = [-1] * experts, [-1] * slots
        for slot, expert in zip(rng.sample(range(slots), len(places)), places, strict=True):
            slot_of[expert], expert_in[slot] = slot, expert
        listed = min(slots, 3 * top_k)
        order = rng.sample(range(slots), rng.randint(min(listed, top_k), listed))
        if len(order) < listed:  # then it is all slots that are left
            gone = [slot for slot in range(slots) if slot not in order]
            for slot in gone:
                if expert_in[slot] >= 0:
                    slot_of[expert_in[slot]] = -1
                expert_in[slot] = -1
        self.known = rng.randint(0, 3)
        row = [self.known, *order, *[-1] * (listed - len(order))]
        numbers = [
            slot_of,
            expert_in,
            [rng.randint(0, 5) for _ in range(slots)],
            [4 * slot + 1 for slot in range(slots)],
            [rng.randrange(64) * 64 for _ in range(experts)],
            row,
            [5],
            [0] * (LOG_HEAD + 2 * top_k),
        ]
        self.tables = LayerTables(*(torch.tensor(each) for each in numbers))

    def copy(self) -> LayerTables:
        return LayerTables(*(each.clone() for each in self.tables))


SHAPES = [(8, 3, 2), (8, 8, 2), (12, 4, 4), (16, 9, 3), (128, 64, 8), (60, 20, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tables_become_what_torch_makes_of_them(shape: tuple[int, int, int]) -> None:
    fetch, oracle = fetch_kernels(torch.device("cpu")), torch_kernels.TorchFetch()
    assert isinstance(fetch, TritonFetch)
    for seed in range(12):
        case = Tables(*shape, seed)
        ids = torch.tensor(case.rng.sample(range(case.experts), case.top_k))
        got, want = case.copy(), case.copy()
        found = fetch.look_up(got, ids, begins=seed % 2 == 0)
        assert torch.equal(found, oracle.look_up(want, ids, begins=seed % 2 == 0))
        want.log[2:3] = 0  # the interpreter has no clock
        for name, one, other in zip(LayerTables._fields, got, want, strict=True):
            assert torch.equal(one, other), name
        assert got.log[0] == (6 if seed % 2 == 0 else 5)


@pytest.mark.parametrize("nbytes", [4096, 65536 + 4096, 1 << 20])
def test_absent_experts_are_brought_and_nothing_else_is_touched(nbytes: int) -> None:
    fetch = fetch_kernels(torch.device("cpu"))
    assert fetch is not None
    generator = torch.Generator().manual_seed(nbytes)
    ram = torch.randint(256, (4 * nbytes,), dtype=torch.uint8, generator=generator)
    arena = torch.full((5 * nbytes,), 0xA5, dtype=torch.uint8)
    slots, experts = [3, 0, 1, -1], [2, 0, 3, 1]  # by slot from the base, which lies amid the arena
    offsets = torch.tensor([slot * nbytes // UNIT for slot in slots])
    log = torch.tensor([7, 0, 0, 0, *experts, 3, -1, 1, -1])
    sources = torch.tensor([expert * nbytes for expert in range(4)])
    nothing = torch.zeros(1, dtype=torch.int64)
    tables = LayerTables(nothing, nothing, nothing, offsets, sources, nothing, nothing, log)
    fetch.bring(tables, ram, arena[nbytes : 2 * nbytes], nbytes)
    want = torch.full((5 * nbytes,), 0xA5, dtype=torch.uint8)
    want[:nbytes] = ram[2 * nbytes : 3 * nbytes]
    want[nbytes : 2 * nbytes] = ram[3 * nbytes :]
    assert torch.equal(arena, want)


def test_experts_far_beyond_what_32_bits_count() -> None:
    """In RAM and in the arena."""
    fetch, far, nbytes = fetch_kernels(torch.device("cpu")), 5 << 30, 4096
    assert fetch is not None
    ram = torch.empty(far + nbytes, dtype=torch.uint8)  # of which little is ever touched
    arena = torch.empty(far + nbytes, dtype=torch.uint8)
    ram[far:] = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    offsets, sources = torch.tensor([far // UNIT]), torch.tensor([far])
    log, nothing = torch.tensor([7, 0, 0, 0, 0, 0]), torch.zeros(1, dtype=torch.int64)
    tables = LayerTables(nothing, nothing, nothing, offsets, sources, nothing, nothing, log)
    fetch.bring(tables, ram, arena, nbytes)
    assert torch.equal(arena[far:], ram[far:])
