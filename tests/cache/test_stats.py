from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import pytest

from moe_local.cache.stats import (
    STARVED_MIN_TOKENS,
    BytesMoved,
    CacheCounters,
    PrefetchStats,
    RoutedTokens,
    RouterLoad,
    StallSeconds,
    StarvedExpert,
    Stats,
)


def _stats(scale: int = 1) -> Stats:
    return Stats(
        hits_by_layer=(3 * scale, 0),
        misses_by_layer=(1 * scale, 0),
        evictions=5 * scale,
        prefetch=PrefetchStats(issued=4 * scale, used=2 * scale, late=1 * scale, wasted_bytes=700 * scale),
        bytes=BytesMoved(h2d=11 * scale, disk=13 * scale),
        stall=StallSeconds(demand=0.5 * scale, cpu=0.25 * scale),
        tokens=6 * scale,
        routed=RoutedTokens(counts=((2 * scale, 3 * scale), (0, 1 * scale)), tokens=(5 * scale, 1 * scale)),
    )


def test_the_difference_of_two_snapshots_is_what_happened_between() -> None:
    assert _stats(3) - _stats(1) == _stats(2)
    assert _stats() - Stats(hits_by_layer=(0, 0), misses_by_layer=(0, 0), routed=_stats(0).routed) == _stats()


def test_snapshots_of_different_models_do_not_subtract() -> None:
    with pytest.raises(ValueError, match="2 and 1 layers"):
        _stats() - Stats(hits_by_layer=(1,), misses_by_layer=(1,))


def test_rates() -> None:
    stats = _stats()
    assert (stats.hits, stats.misses, stats.hit_rate) == (3, 1, 0.75)
    assert stats.hit_rate_by_layer == (0.75, None)
    assert Stats().hit_rate is None


def test_total_stall_adds_every_cause() -> None:
    assert StallSeconds(demand=1, late_prefetch=2, disk=4, cpu=8, sync=16).total == 31


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        _stats().tokens = 3  # type: ignore[misc]


def test_to_dict_is_json_with_the_documented_names() -> None:
    document = json.loads(json.dumps(_stats().to_dict()))
    assert document == {
        "hits": 3,
        "misses": 1,
        "hit_rate": 0.75,
        "hit_rate_by_layer": [0.75, None],
        "evictions": 5,
        "prefetch": {
            "issued": 4,
            "used": 2,
            "late": 1,
            "wasted_bytes": 700,
            "state": "off",
            "lookahead": 0,
            "gain_ms_per_token": None,
            "gain_ms_low": None,
            "gain_ms_high": None,
        },
        "bytes": {"h2d": 11, "disk": 13},
        "stall_s": 0.75,
        "stall_by_cause_s": {"demand": 0.5, "late_prefetch": 0.0, "disk": 0.0, "cpu": 0.25, "sync": 0.0},
        "tokens": 6,
        "starved": [],
    }


def test_counters_freeze_with_what_others_keep() -> None:
    counters = CacheCounters(layers=2)
    counters.hits_by_layer[0] += 3
    counters.misses_by_layer[0] += 1
    counters.evictions = 5
    counters.prefetch_issued, counters.prefetch_used, counters.prefetch_late = 4, 2, 1
    counters.prefetch_wasted_bytes = 700
    expected = _stats()
    snapshot = counters.snapshot(
        bytes=expected.bytes, stall=expected.stall, tokens=expected.tokens, routed=expected.routed
    )
    assert snapshot == expected
    counters.hits_by_layer[0] += 1
    assert snapshot.hits == 3


def test_router_load_counts_one_by_one_in_bulk_and_by_table() -> None:
    load = RouterLoad(num_experts=[4, 2], top_k=[2, 1])
    load.count_all(0, [1])
    load.count_all(0, [3] * 4)
    load.count_all(0, [1, 3, 3])
    load.add(1, [5, 2])
    assert load.snapshot() == RoutedTokens(counts=((0, 2, 0, 6), (5, 2)), tokens=(4, 7))


def test_router_load_loses_nothing_that_another_thread_counts_meanwhile() -> None:
    load = RouterLoad(num_experts=[2], top_k=[1])
    other = threading.Thread(target=load.count_all, args=(0, [0]))

    class Table(list[int]):
        """Whose numbers are read while somebody else counts, or wants to."""

        def __iter__(self) -> Iterator[int]:
            numbers = super().__iter__()
            yield next(numbers)
            other.start()
            other.join(0.2)
            yield from numbers

    load.add(0, Table([5, 7]))
    other.join()
    assert load.snapshot().counts == ((6, 7),)


def test_router_load_refuses_another_models_shape() -> None:
    with pytest.raises(ValueError, match="experts of 2 layers but top-k of 1"):
        RouterLoad(num_experts=[4, 2], top_k=[2])
    with pytest.raises(ValueError, match="shorter"):
        RouterLoad(num_experts=[4], top_k=[2]).add(0, [1, 2, 3])


def test_starved_experts_are_named_with_their_share() -> None:
    tokens = 2 * STARVED_MIN_TOKENS
    load = RouterLoad(num_experts=[4, 4], top_k=[2, 2])
    # 1 % exactly is enough; an expert nobody chose is starved as well.
    load.add(0, [tokens, tokens - tokens // 100 - 19, tokens // 100, 19])
    load.add(1, [tokens, tokens, 0, 0])
    starved = load.snapshot().starved
    assert starved == (
        StarvedExpert(0, 3, 19 / tokens),
        StarvedExpert(1, 2, 0.0),
        StarvedExpert(1, 3, 0.0),
    )
    document = Stats(routed=load.snapshot()).to_dict()
    assert document["starved"][0] == {"layer": 0, "expert": 3, "share": 19 / tokens}


def test_few_tokens_starve_nobody() -> None:
    load = RouterLoad(num_experts=[4], top_k=[1])
    load.add(0, [STARVED_MIN_TOKENS - 1, 0, 0, 0])
    assert load.snapshot().starved == ()
    load.count_all(0, [0])
    assert [expert for _, expert, _ in load.snapshot().starved] == [1, 2, 3]


def test_starvation_is_judged_on_the_tokens_between_two_snapshots() -> None:
    load = RouterLoad(num_experts=[2], top_k=[1])
    load.add(0, [STARVED_MIN_TOKENS, 0])
    before = Stats(routed=load.snapshot())
    load.add(0, [0, STARVED_MIN_TOKENS])
    after = Stats(routed=load.snapshot())
    assert after.starved == ()
    assert (after - before).starved == (StarvedExpert(0, 0, 0.0),)


def test_two_stretches_add_up() -> None:
    first, both = _stats(), _stats() + _stats()
    assert both - first == first
    assert (both.hits_by_layer, both.prefetch.issued, both.stall.demand) == ((6, 0), 8, 1.0)


def test_what_prefetch_is_worth_is_of_the_later_moment() -> None:
    early = PrefetchStats(4, 2, 1, 700, "trying", 0)
    late = PrefetchStats(9, 5, 2, 900, "on", 1, 2.5, 2.0, 3.0)
    assert late - early == PrefetchStats(5, 3, 1, 200, "on", 1, 2.5, 2.0, 3.0)
    counters = CacheCounters(1)
    counters.prefetch_issued, counters.prefetch_gain = 9, late
    assert counters.snapshot().prefetch == PrefetchStats(9, 0, 0, 0, "on", 1, 2.5, 2.0, 3.0)
