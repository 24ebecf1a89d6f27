"""The slab against transformers' own caches: same logits, whatever is joined, left, cut or aborted."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_local.offload.engine.kv_slab import KVSlab, can_slab, probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.state_slab import StateSlab
from support import tiny_models
from support.engine_runs import random_ids

torch.set_num_threads(1)
TOLERANCE = 2e-4
CASES = {
    "mixtral": {},
    "mixtral-window": {"sliding_window": 8},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "deepseek_v3": {},
}


@pytest.fixture(scope="module", params=list(CASES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param.split("-")[0], **CASES[request.param])


@pytest.fixture(scope="module")
def stateful() -> Any:
    """Three layers of linear attention, which keep a state, and one of full attention."""
    return tiny_models.tiny_model("qwen3_next")


def poisoned(kv: Any) -> Any:
    """The slab with NaN in every column, so that reading one that was not written shows."""
    assert isinstance(kv, KVSlab)
    for store in kv.layers:
        for tensor in store.tensors() if store is not None else ():
            tensor.fill_(float("nan"))
    return kv


@torch.inference_mode()
def forward(model: Any, kv: Any, row: int, ids: list[int]) -> torch.Tensor:
    start = kv.lens[row]
    positions = torch.arange(start, start + len(ids))[None]
    output = model(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=kv.row(row))
    kv.advance(row, len(ids))
    logits: torch.Tensor = output.logits[0, -1]
    return logits


@torch.inference_mode()
def reference(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


def test_chunks_equal_one_forward(model: Any) -> None:
    ids = random_ids(45)
    kv = poisoned(make_kv(model, 3, 45))
    rows = [kv.join() for _ in range(3)]
    start = 0
    for count in (20, 1, 7, 1, 16):
        logits = forward(model, kv, rows[1], ids[start : start + count])
        start += count
        torch.testing.assert_close(logits, reference(model, ids[:start]), rtol=0, atol=TOLERANCE)
        kv.check_integrity()
    assert kv.lens == [0, 45, 0]


def test_shorten_is_exact_behind_the_window(model: Any) -> None:
    ids, other = random_ids(40), random_ids(12, seed=1)
    kv = poisoned(make_kv(model, 1, 64))
    row = kv.join()
    forward(model, kv, row, ids)
    kv.shorten(row, 23)
    logits = forward(model, kv, row, other)
    torch.testing.assert_close(logits, reference(model, ids[:23] + other), rtol=0, atol=TOLERANCE)


def test_an_aborted_forward_leaves_no_trace(model: Any) -> None:
    ids = random_ids(30)
    kv = poisoned(make_kv(model, 1, 40))
    row = kv.join()
    forward(model, kv, row, ids[:20])
    hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("mid-step")))
    with pytest.raises(RuntimeError, match="mid-step"):
        forward(model, kv, row, random_ids(9, seed=2))
    hook.remove()
    kv.abort(row)
    assert kv.lens == [20]
    torch.testing.assert_close(
        forward(model, kv, row, ids[20:]), reference(model, ids), rtol=0, atol=TOLERANCE
    )


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_never_mix(mixtral: Any, seed: int) -> None:
    """Random joins, leaves, cuts and forwards on three rows; each always equal to its ids alone."""
    chance = random.Random(seed)
    kv = poisoned(make_kv(mixtral, 3, 24))
    held: list[list[int]] = []
    for _ in range(14):
        action = chance.choice(["join", "leave", "shorten", "forward", "forward", "forward"])
        if action == "join" and len(held) < 3:
            assert kv.join() == len(held)
            held.append([])
        elif held:
            row = chance.randrange(len(held))
            if action == "leave":
                kv.leave(row)
                last = held.pop()
                if row < len(held):
                    held[row] = last
            elif action == "shorten":
                length = chance.randint(0, len(held[row]))
                kv.shorten(row, length)
                del held[row][length:]
            elif room := 24 - len(held[row]):
                new = random_ids(chance.randint(1, min(room, 6)), seed=chance.randrange(10**6))
                held[row] += new
                logits = forward(mixtral, kv, row, new)
                torch.testing.assert_close(logits, reference(mixtral, held[row]), rtol=0, atol=TOLERANCE)
        kv.check_integrity()
        assert kv.lens == [len(ids) for ids in held]


def test_is_allocated_once_and_exactly(model: Any) -> None:
    probe = probe_cache(model)
    kv = make_kv(model, 2, 100, probe)
    assert isinstance(kv, KVSlab)
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in probe.layers)
    assert kv.nbytes == 2 * 100 * per_token
    before = [tensor.data_ptr() for store in kv.layers if store for tensor in store.tensors()]
    row = kv.join()
    for token in random_ids(12):
        forward(model, kv, row, [token])
    assert before == [tensor.data_ptr() for store in kv.layers if store for tensor in store.tensors()]


def test_made_in_inference_mode_it_works_outside(mixtral: Any) -> None:
    with torch.inference_mode():
        kv = make_kv(mixtral, 1, 8)
    row = kv.join()
    with torch.no_grad():
        mixtral(input_ids=torch.tensor([[5, 6]]), past_key_values=kv.row(row))


def test_memory_is_freed_with_the_slab(mixtral: Any) -> None:
    """At once, not when the garbage collector comes by: on a GPU the next load needs it."""
    kv = make_kv(mixtral, 2, 8)
    assert isinstance(kv, KVSlab)
    forward(mixtral, kv, kv.join(), [5, 6])
    memory = [weakref.ref(tensor) for store in kv.layers if store for tensor in store.tensors()]
    gc.disable()
    try:
        del kv
        assert [ref() for ref in memory] == [None] * len(memory)
    finally:
        gc.enable()


def test_more_tokens_than_columns_are_refused(mixtral: Any) -> None:
    kv = make_kv(mixtral, 2, 8)
    row = kv.join()
    with pytest.raises(RuntimeError):
        forward(mixtral, kv, row, random_ids(9))
    assert kv.lens == [0]


def test_integrity_notices_a_wrong_length(mixtral: Any) -> None:
    kv = make_kv(mixtral, 1, 8)
    kv.join()
    kv.lens[0] = 9
    with pytest.raises(AssertionError):
        kv.check_integrity()


@pytest.mark.parametrize("own_caches", [False, True])
def test_layers_that_keep_a_state(stateful: Any, monkeypatch: pytest.MonkeyPatch, own_caches: bool) -> None:
    monkeypatch.setattr("moe_local.offload.engine.kv_slab.SWAPPED", 4)
    assert not can_slab(probe_cache(stateful))
    kv = OwnCaches(stateful.config, 2, 30) if own_caches else make_kv(stateful, 2, 30)
    assert isinstance(kv, OwnCaches if own_caches else StateSlab)
    first, second = random_ids(20), random_ids(13, seed=1)
    rows = [kv.join(), kv.join()]
    forward(stateful, kv, rows[0], first[:9])
    forward(stateful, kv, rows[1], second[:4])
    assert kv.nbytes > 0
    kv.swap(*rows)
    kv.check_integrity()
    assert kv.lens == [4, 9]
    close(forward(stateful, kv, rows[1], first[9:]), reference(stateful, first))
    kv.leave(rows[1])
    kv.check_integrity()
    assert kv.lens == [4]
    close(forward(stateful, kv, 0, second[4:]), reference(stateful, second))
    assert kv.reusable(0, 13) == 13
    assert kv.reusable(0, 12) == 0, "a state can not be rolled back"
    kv.abort(0)
    assert kv.lens == [0]
    close(forward(stateful, kv, 0, first), reference(stateful, first))
    kv.shorten(0, 0)
    close(forward(stateful, kv, 0, second), reference(stateful, second))


def close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """For layers with a state, where sums of products decay and round in another order for every chunk."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=5 * TOLERANCE)


def test_jamba_takes_its_prompt_whole() -> None:
    """transformers' scan starts from zero when it gets several tokens after a state."""
    from transformers import AutoConfig

    kv = OwnCaches(AutoConfig.for_model("jamba"), 1, 100)
    row = kv.join()
    assert kv.chunk(row, 70, 16) == 70
    kv.advance(row, 70)
    assert kv.chunk(row, 5, 16) == 1
    assert kv.reusable(row, 70) == 0
    plain = OwnCaches(AutoConfig.for_model("qwen3_next"), 1, 100)
    assert plain.chunk(plain.join(), 70, 16) == 16


class Allocations(TorchDispatchMode):
    """Where each operation that does not give a view was told to put its result; None: where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if all(returned.alias_info is None for returned in function._schema.returns):
            self.places.append((kwargs or {}).get("device"))
        return function(*args, **(kwargs or {}))


def test_states_are_put_back_from_ram(stateful: Any) -> None:
    """As often as asked, and of no other row; a card has no room for a second copy."""
    kv = make_kv(stateful, 2, 40)
    assert isinstance(kv, StateSlab)
    for ids in ([5, 6, 7], [8, 9]):
        row = kv.join()
        forward(stateful, kv, row, ids)
        kv.advance(row, len(ids))
    tensors = [tensor for store in kv.states.values() for tensor in store.tensors()]
    before = [tensor.clone() for tensor in tensors]
    with Allocations() as made:
        put_back = kv.mark(1)
    assert made.places == [torch.device("cpu")] * len(tensors)
    for token in (11, 12):
        for row in (0, 1):
            forward(stateful, kv, row, [token])
        assert not any(torch.equal(new[1], old[1]) for new, old in zip(tensors, before, strict=True))
        put_back()
        for new, old in zip(tensors, before, strict=True):
            assert torch.equal(new[1], old[1])
            assert not torch.equal(new[0], old[0])
