"""What only a device has: its waits for the host, and the ways of a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.measure.bench import Bench, comparison
from moe_local.offload.measure.variants import Switches, expert_runner, timed_syncs
from moe_local.offload.measure.workloads import choose
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.plan import Request

OPTIONS = LoadOptions(slots=3, device="cpu", miss="auto", prefetch="off")


@pytest.fixture(scope="module")
def model(
    tiny_mixtral: Path, make_device: Callable[..., Any], home_of_file: Path
) -> Iterator[moe_local.Model]:
    """3 of 8 experts a layer on a device that isn't there, all of them in RAM."""
    checkpoint = Checkpoint.open(tiny_mixtral, "tiny")
    request = Request(model="tiny", spec=checkpoint.spec, ram=1 << 30, vram=1 << 30, context=128, slots=3)
    plan = plan_request(request).check()
    file = open_experts(checkpoint, "nf4")
    with assemble(checkpoint, file, plan, OPTIONS, torch.device("cpu"), make_device(1)) as loaded:
        yield loaded


def test_waits_for_the_host_are_timed_on_demand(model: moe_local.Model) -> None:
    for timed in (False, True):
        before = model.stats()
        if timed:
            with timed_syncs(model):
                model.generate([5, 6, 7], max_new_tokens=6, eos_token_id=None)
        else:
            model.generate([5, 6, 7], max_new_tokens=6, eos_token_id=None)
        spent = model.stats() - before
        assert (spent.stall.sync > 0) == timed
        assert spent.stall.total > 0
    assert not expert_runner(model).times_sync


def test_each_way_of_a_miss_is_another_variant(model: moe_local.Model) -> None:
    switches = Switches(model, OPTIONS)
    ways = {variant.miss: variant for variant in switches.variants() if variant.miss}
    assert set(ways) == {"fetch", "cpu"}
    host = model.parts.store.host
    assert host is not None
    ids = []
    for miss in ("fetch", "cpu"):
        switches.begin(ways[miss])
        before = model.stats()
        ids.append(model.generate([5, 6, 7], max_new_tokens=6, eos_token_id=None).token_ids)
        spent = model.stats() - before
        assert spent.misses > 0
        assert (spent.bytes.h2d == spent.misses * model.plan.bytes.expert) == (miss == "fetch")
        assert (model.parts.store.host is None) == (miss == "fetch")
    assert ids[0] == ids[1], "these kernels are the same ones"
    switches.restore()
    assert (model.parts.store.host, host.scheduler.mode) == (host, "auto")
    model.check_integrity()


def test_all_variants_in_turn(model: moe_local.Model) -> None:
    bench = Bench(model, Switches(model, OPTIONS), choose("single", 8, 1), compare=True, tokens=4, repeats=1)
    bench.run()
    rows = comparison(bench.results)
    assert {row["name"] for row in rows} >= {"no cache", "policy lfu", "miss fetch", "miss cpu"}
    assert all(row["same_ids"] for row in rows)
    assert [row["figures"]["bytes_per_token"]["disk"] for row in rows] == [0] * len(rows)
    model.check_integrity()
