"""A whole measurement of a tiny model: figures that belong together, ablations, Ctrl-C."""

from __future__ import annotations

import json
from typing import Any

import pytest

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.cache.stats import Stats
from moe_local.offload.measure.bench import Bench
from moe_local.offload.measure.document import document
from moe_local.offload.measure.floor import Floor
from moe_local.offload.measure.prompts import long_prompt, questions, topics
from moe_local.offload.measure.sample import Taker
from moe_local.offload.measure.variants import AS_LOADED, Switches, Variant, expert_runner
from moe_local.offload.measure.workloads import choose
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.bandwidth import Bandwidths

OPTIONS = LoadOptions(slots=3, device="cpu", prefetch="router")
TOKENS = 5


@pytest.fixture
def make(model: moe_local.Model) -> Any:
    def bench(workloads: str, **options: Any) -> Bench:
        settings = {"compare": False, "tokens": TOKENS, "repeats": 2, **options}
        return Bench(model, Switches(model, OPTIONS), choose(workloads, 40, 3), **settings)

    return bench


@pytest.fixture
def floor(model: moe_local.Model) -> Floor:
    return Floor.of(model.plan, Bandwidths(ram=1e9, disk=1e8))


def test_every_workload_has_all_figures(make: Any, floor: Floor) -> None:
    told: list[tuple[str, int, int]] = []
    bench = make("single,chat,long,batch", progress=lambda *words: told.append(words))
    bench.run()
    found = json.loads(json.dumps(document(bench, floor, OPTIONS, ["a note"])))
    assert told == [("measuring", done, 12) for done in range(12)]
    answers = {"single": 1, "chat": 4, "long": 1, "batch": 3}
    for name, figures in found["workloads"].items():
        assert figures["decoded_tokens"] == 2 * answers[name] * (TOKENS - 1)
        stalls = figures["stall_ms_per_token"]
        assert set(stalls) == {"demand", "late_prefetch", "disk", "cpu", "sync"}
        assert stalls["demand"] == stalls["cpu"] == stalls["sync"] == 0
        assert figures["other_ms_per_token"] > 0
        assert 0 < figures["hit_rate"]["cold"] < 1
        assert figures["bytes_per_token"]["disk"] > 0 == figures["bytes_per_token"]["h2d"]
        assert figures["floor_with_misses_ms_per_token"] >= floor.ms_per_token
        tpot = figures["tpot_ms"]
        assert 0 < tpot["p50"] <= tpot["p95"] <= tpot["p99"]
        assert len(figures["hit_rate"]["by_layer"]) == 3
    assert found["workloads"]["long"]["prompt_tokens"] == 40
    assert found["workload"] == "single"
    assert found["tpot_ms"] == found["workloads"]["single"]["tpot_ms"]
    assert found["floor"]["ms_per_token"] == pytest.approx(
        1000 * sum(found["floor"]["bytes_per_token"].values()) / 1e9
    )
    assert found["peak_bytes"]["ram"] > 1 << 20
    assert found["machine"]["device"] == "cpu"
    assert "a note" in found["notes"]
    assert sum(map(sum, found["experts_used"])) > 0
    runs = found["runs"]
    assert [len(run) for run in runs] == [TOKENS - 1] * 2
    spent = sum(step["ms"] for run in runs for step in run)
    stalled = sum(sum(step["stall_ms"].values()) for run in runs for step in run)
    parts = found["other_ms_per_token"] + sum(found["stall_ms_per_token"].values())
    assert spent / (2 * (TOKENS - 1)) == pytest.approx(parts)
    assert stalled < spent


def test_ablations_change_what_their_names_say(make: Any, floor: Floor, model: moe_local.Model) -> None:
    prefetcher = expert_runner(model).prefetcher
    bench = make("single,long", compare=True, repeats=1)
    bench.run()
    rows = {row["name"]: row for row in document(bench, floor, OPTIONS, [])["compare"]}
    assert {"no cache", "no prefetch", "policy lfu", "policy fifo"} <= set(rows)
    assert "policy lru" not in rows
    assert all(row["same_ids"] for row in rows.values())
    assert rows["no cache"]["figures"]["hit_rate_timed"] == 0
    assert rows["no cache"]["hit_rate"]["cold"] == 0
    assert rows["no prefetch"]["figures"]["prefetch"]["issued"] == 0
    assert rows["policy lfu"]["figures"]["prefetch"]["issued"] > 0
    assert all(row["decode"]["rounds"] == 1 for row in rows.values())
    assert expert_runner(model).prefetcher is prefetcher


def test_without_a_cache_every_step_brings_all_it_needs(model: moe_local.Model) -> None:
    switches = Switches(model, OPTIONS)
    switches.begin(Variant("no cache", cache=False, prefetch=False))
    steps: list[Stats] = []
    taker = Taker(model, TOKENS, before=model.parts.store.empty, after=lambda step: steps.append(step.counts))
    taker.answer(long_prompt(model.tokenizer, 0, 9))
    assert [(s.hits, s.misses) for s in steps[1:]] == [(0, 6)] * (TOKENS - 1)
    switches.restore()


def test_ctrl_c_keeps_the_runs_that_were_over(make: Any, floor: Floor, model: moe_local.Model) -> None:
    """It comes in the second of two timed rounds, in the middle of an answer."""
    left = 2 * TOKENS + 2

    def watch(step: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    bench = make("single", watch=watch)
    bench.run()
    found = document(bench, floor, OPTIONS, [])
    assert found["interrupted"]
    assert (found["repeats"], found["decoded_tokens"]) == (1, TOKENS - 1)
    assert any("interrupted" in note for note in found["notes"])
    model.check_integrity()


def test_ctrl_c_before_anything_was_timed(make: Any, floor: Floor) -> None:
    def watch(step: object) -> None:
        raise KeyboardInterrupt

    bench = make("single", watch=watch)
    bench.run()
    found = document(bench, floor, OPTIONS, [])
    assert (found["interrupted"], found["repeats"], "tpot_ms" in found) == (True, 0, False)


def test_prompts_are_text_and_equal_for_equal_numbers(model: moe_local.Model) -> None:
    assert all(topic.sentences for topic in topics())
    assert questions(0, 4)[1::2] == ["why?", "can you give me an example?"]
    assert questions(0, 4)[0] != questions(0, 4)[2], "topics shift"
    assert len({questions(number, 1)[0] for number in range(20)}) == 20
    tokenizer = model.tokenizer
    prompt = long_prompt(tokenizer, 1, 300)
    assert len(prompt) == 300
    assert prompt[:100] == long_prompt(tokenizer, 1, 100) != long_prompt(tokenizer, 2, 100)
    assert tokenizer.decode(prompt[:60]) in " ".join(s for t in topics() for s in t.sentences)
    assert bytes(b - 3 for b in long_prompt(None, 0, 20)).decode().startswith(topics()[0].sentences[0][:20])


def test_unknown_workloads_are_named() -> None:
    assert [w.name for w in choose("batch, single", 8, 2)] == ["batch", "single"]
    with pytest.raises(OptionError, match="unknown workload 'chats'; use some of single, chat, long, batch"):
        choose("single,chats", 8, 2)


def test_the_variants_are_none_that_change_nothing(model: moe_local.Model) -> None:
    variants = Switches(model, OPTIONS).variants()
    assert AS_LOADED not in variants
    assert len({variant.name for variant in variants}) == len(variants)
    assert not any(variant.miss for variant in variants), "there is no device to fetch to"
