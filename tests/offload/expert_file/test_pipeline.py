"""The three threads of a conversion: at work together, in order, and gone whatever happens."""

from __future__ import annotations

import itertools
import threading

import pytest

from moe_local.cache.errors import ExpertFileError
from moe_local.offload.expert_file.expert_shard import ShardPlan, ShardWriter
from moe_local.offload.expert_file.pipeline import write_shards
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec

LAYOUTS = [codec_for("bf16").layout([TensorSpec("w", (rows, 64))]) for rows in (64, 8, 100)]
PLANS = [ShardPlan("f" * 32, "bf16", layer, f"layers.{layer}", tuple(LAYOUTS)) for layer in range(2)]
ALL = [(layer, expert) for layer in range(2) for expert in range(3)]
WAIT = 100
"""Seconds after which a thread that should have come by is given up."""


class Steps:
    """Stages that write down what they do. Expert (l, e) is filled with 10 * l + e + 1."""

    def __init__(self) -> None:
        self.read_log: list[tuple[int, int]] = []
        self.encode_log: list[tuple[int, int]] = []
        self.written_log: list[int] = []
        self.memory: dict[tuple[int, int], int] = {}

    def read(self, plan, expert, memory):
        self.read_log.append((plan.layer, expert))
        block = memory(plan.layouts[expert].nbytes)
        self.memory[plan.layer, expert] = block.data_ptr()
        return {"w": block.fill_(10 * plan.layer + expert + 1)}

    def encode(self, plan, expert, tensors, out):
        self.encode_log.append((plan.layer, expert))
        assert threading.current_thread() is threading.main_thread()
        out.copy_(tensors["w"])

    def written(self, layout):
        assert threading.current_thread() is threading.main_thread()
        self.written_log.append(layout.nbytes)

    def run(self, folder):
        return write_shards(PLANS, folder, self.read, self.encode, self.written)


@pytest.fixture
def steps():
    before = set(threading.enumerate())
    yield Steps()
    assert set(threading.enumerate()) <= before


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_the_experts_in_order(steps, tmp_path):
    checksums = steps.run(tmp_path)
    assert steps.read_log == steps.encode_log == ALL
    assert steps.written_log == [layout.nbytes for layout in LAYOUTS] * 2
    for plan, found in zip(PLANS, checksums, strict=True):
        assert plan.stored_checksums(tmp_path) == found
        raw = (tmp_path / plan.file).read_bytes()
        for expert, offset in enumerate(plan.offsets()):
            nbytes = plan.layouts[expert].nbytes
            assert raw[offset : offset + nbytes] == bytes([10 * plan.layer + expert + 1]) * nbytes


def test_no_plans(steps, tmp_path):
    assert write_shards([], tmp_path, steps.read, steps.encode, steps.written) == []
    assert names(tmp_path) == []


def test_reading_encoding_and_writing_overlap(steps, tmp_path, monkeypatch):
    """Expert 2 is read, and expert 0 written, while expert 1 is being encoded."""
    read, wrote = threading.Event(), threading.Event()
    plain_read, plain_encode, plain_add = steps.read, steps.encode, ShardWriter.add

    def reading(plan, expert, memory):
        tensors = plain_read(plan, expert, memory)
        if (plan.layer, expert) == (0, 2):
            read.set()
        return tensors

    def adding(writer, data):
        plain_add(writer, data)
        wrote.set()

    def encoding(plan, expert, tensors, out):
        if (plan.layer, expert) == (0, 1):
            assert read.wait(WAIT)
            assert wrote.wait(WAIT)
        plain_encode(plan, expert, tensors, out)

    monkeypatch.setattr(ShardWriter, "add", adding)
    steps.read, steps.encode = reading, encoding
    steps.run(tmp_path)


def test_two_memories_take_turns(steps, tmp_path):
    """Neighbours never share one, and only an expert larger than all before it makes a memory grow."""
    steps.run(tmp_path)
    sizes = [layout.nbytes for layout in LAYOUTS] * 2
    for turn in (0, 1):
        largest = itertools.accumulate(sizes[turn::2], max)
        uses = [(size, steps.memory[key]) for size, key in zip(largest, ALL[turn::2], strict=True)]
        assert all(a[1] == b[1] for a, b in itertools.pairwise(uses) if a[0] == b[0])
    assert all(steps.memory[one] != steps.memory[next_one] for one, next_one in itertools.pairwise(ALL))


@pytest.mark.parametrize("stage", ["read", "encode", "written"])
@pytest.mark.parametrize(("at", "kept"), [((0, 0), 0), ((1, 0), 1), ((1, 2), 1)])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_what_was_complete(steps, tmp_path, stage, at, kept, error):
    plain = getattr(steps, stage)
    calls = iter(ALL)

    def failing(*arguments):
        if next(calls) == at:
            raise error("it went wrong")
        return plain(*arguments)

    setattr(steps, stage, failing)
    with pytest.raises(error, match="it went wrong"):
        steps.run(tmp_path)
    complete = names(tmp_path)
    if stage == "written":  # told when the next but one is encoded, by which time more may have been written
        assert kept <= len(complete) <= 2
    else:
        assert complete == [plan.file for plan in PLANS[:kept]]


@pytest.mark.parametrize(("number", "kept"), [(0, 0), (3, 1), (5, 1)])
def test_a_writer_that_fails_ends_it(steps, tmp_path, monkeypatch, number, kept):
    plain, calls = ShardWriter.add, []

    def failing(writer, data):
        calls.append(data)
        if len(calls) > number:
            raise ExpertFileError("cannot write")
        plain(writer, data)

    monkeypatch.setattr(ShardWriter, "add", failing)
    with pytest.raises(ExpertFileError, match="cannot write"):
        steps.run(tmp_path)
    assert names(tmp_path) == [plan.file for plan in PLANS[:kept]]
    assert len(steps.encode_log) <= number + 3  # two buffers, and the one that came back


def test_buffers_start_on_pages(steps, tmp_path):
    """Or they could not be written directly."""
    addresses = set()
    plain = steps.encode

    def encode(plan, expert, tensors, out):
        addresses.add(out.data_ptr())
        plain(plan, expert, tensors, out)

    steps.encode = encode
    steps.run(tmp_path)
    assert len(addresses) == 2
    assert all(address % 4096 == 0 for address in addresses)
