"""Mamba-2's layers by the library, against transformers' own functions and models."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as transformers_module

import moe_local
from moe_local.offload.dense import convolution, state_pieces
from moe_local.offload.dense import mamba2 as module_under_test
from moe_local.offload.dense.mamba2 import (
    NAMES,
    SCAN,
    UPDATE,
    holds_no_states,
    scan_sequences,
    update_state,
    use_native_mamba2,
)
from moe_local.offload.dense.state_pieces import LONGEST, SHORTEST, use_state_pieces
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.native.library import library, loaded_library
from support import tiny_models

usual_update: Any = getattr(transformers_module, UPDATE, None)
usual_scan: Any = getattr(transformers_module, SCAN, None)

pytestmark = [
    pytest.mark.skipif(usual_update is None, reason="this transformers computes them in the layer"),
    pytest.mark.skipif(library() is None, reason="the C++ library was not compiled"),
]

BATCH, HEADS, WIDTH, STATE = 2, 6, 8, 16
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("granitemoehybrid", {}),
    ("nemotron_h", {}),
    ("nemotron_h", {"n_groups": 2, "ssm_state_size": 32}),
]
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 0.02}


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("transformers' own function was called")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def step(groups: int, dtype: torch.dtype, **changed: Any) -> dict[str, Any]:
    """Arguments as a layer gives them for one token: one number a head, expanded."""
    torch.manual_seed(groups)
    each = {name: torch.randn(HEADS) for name in ("A", "D", "dt_bias")}
    return {
        "state": torch.randn(BATCH, HEADS, WIDTH, STATE),
        "hidden_states": torch.randn(BATCH, HEADS, WIDTH).to(dtype),
        "dt": torch.randn(BATCH, HEADS, 1).to(dtype).expand(-1, -1, WIDTH),
        "A": (-each["A"].exp())[:, None, None].expand(-1, WIDTH, STATE),
        "B": torch.randn(BATCH, groups, STATE).to(dtype),
        "C": torch.randn(BATCH, groups, STATE).to(dtype),
        "D": each["D"][:, None].expand(-1, WIDTH),
        "z": None,
        "dt_bias": each["dt_bias"][:, None].expand(-1, WIDTH),
        "dt_softplus": True,
    } | changed


def prompt(groups: int, dtype: torch.dtype, tokens: int = 21, **changed: Any) -> dict[str, Any]:
    """Arguments as a layer gives them for several tokens: slices of one array."""
    torch.manual_seed(groups)
    sizes = [HEADS * WIDTH, groups * STATE, groups * STATE]
    x, b, c = torch.randn(BATCH, tokens, sum(sizes)).to(dtype).split(sizes, dim=-1)
    return {
        "hidden_states": x.view(BATCH, tokens, HEADS, WIDTH),
        "dt": torch.randn(BATCH, tokens, HEADS + 3).to(dtype)[..., 3:],
        "A": -torch.randn(HEADS).exp(),
        "B": b.view(BATCH, tokens, groups, STATE),
        "C": c.view(BATCH, tokens, groups, STATE),
        "chunk_size": 8,
        "D": torch.randn(HEADS),
        "z": None,
        "dt_bias": torch.randn(HEADS),
        "initial_states": torch.randn(BATCH, HEADS, WIDTH, STATE),
        "dt_softplus": True,
        "dt_limit": (0.001, float("inf")),
        "return_final_states": True,
    } | changed


@pytest.mark.parametrize("groups", [1, 3, HEADS])
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("changed", [{}, {"D": None}, {"dt_bias": None}, {"dt_softplus": False}])
def test_a_step_and_the_state_after_it(groups: int, dtype: torch.dtype, changed: dict[str, Any]) -> None:
    mine, theirs = step(groups, dtype, **changed), step(groups, dtype, **changed)
    got, wanted = update_state(never, **mine), usual_update(**theirs)
    assert got.dtype is dtype
    for a, b in ((got, wanted), (mine["state"], theirs["state"])):
        assert relative(a, b) <= ALLOWED[dtype]
    assert not torch.equal(mine["state"], step(groups, dtype)["state"]), "it is overwritten"


@pytest.mark.parametrize("groups", [1, 3, HEADS])
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(
    "changed",
    [
        *({}, {"D": None}, {"dt_bias": None}, {"dt_softplus": False, "dt_limit": (0.1, 1.0)}),
        *({"initial_states": None}, {"tokens": 1}, {"dt_limit": (0.3, 0.9)}),
    ],
)
def test_a_prompt_and_the_state_after_it(groups: int, dtype: torch.dtype, changed: dict[str, Any]) -> None:
    """Time steps are rounded as transformers rounds them; all else is fp32 there, too."""
    got, state = scan_sequences(never, **prompt(groups, dtype, **changed))
    wanted, last = usual_scan(**prompt(groups, dtype, **changed))
    assert got.dtype is wanted.dtype is torch.float32
    assert relative(got, wanted) <= 2e-6
    assert relative(state, last) <= 2e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"z": torch.randn(BATCH, HEADS, WIDTH)},
        {"dt": torch.randn(BATCH, HEADS, WIDTH)},
        {"A": -torch.rand(HEADS, WIDTH, STATE)},
        {"A": (-torch.rand(HEADS, WIDTH, 1)).expand(-1, -1, STATE)},
        {"D": torch.randn(HEADS, WIDTH)},
        {"dt_bias": torch.randn(HEADS, WIDTH)},
        {"state": torch.randn(BATCH, HEADS, WIDTH, STATE).to(torch.bfloat16)},
    ],
)
def test_other_steps_are_left_to_transformers(changed: dict[str, Any]) -> None:
    mine, theirs = (
        {k: v.clone() if k == "state" else v for k, v in step(2, torch.float32, **changed).items()}
        for _ in "12"
    )
    assert torch.equal(update_state(usual_update, **mine), usual_update(**theirs))
    assert torch.equal(mine["state"], theirs["state"])
    with pytest.raises(AssertionError, match="own function"):
        update_state(never, **mine)


@pytest.mark.parametrize(
    "changed",
    [
        {"return_final_states": False},
        {"z": torch.randn(BATCH, 21, HEADS, WIDTH)},
        {"hidden_states": torch.randn(BATCH, 21, HEADS, WIDTH).to(torch.float64)},
        {"dt": torch.randn(BATCH, 21, HEADS).to(torch.bfloat16)},
        {"initial_states": torch.randn(BATCH, HEADS, WIDTH, STATE).to(torch.bfloat16)},
        {"initial_states": torch.randn(BATCH, HEADS, STATE, WIDTH).transpose(2, 3)},
        {name: torch.randn(BATCH, 21, 2, STATE - 1) for name in "BC"} | {"initial_states": None},
    ],
)
def test_other_prompts_are_left_to_transformers(changed: dict[str, Any]) -> None:
    given = prompt(2, torch.float32, **changed)
    got, wanted = scan_sequences(usual_scan, **given), usual_scan(**given)
    for mine, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, wanted)), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(AssertionError, match="own function"):
        scan_sequences(never, **given)


@pytest.mark.parametrize("name", convolution.STARTS)
def test_where_packed_sequences_start_is_for_transformers_function(name: str) -> None:
    with pytest.raises(AssertionError, match="own function"):
        scan_sequences(never, **prompt(2, torch.float32), **{name: torch.tensor([0, 4, 21])})


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "ssm_state_size")]


def logits(model: Any, lengths: tuple[int, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Of two sequences, which go through the model in pieces of these lengths."""
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.randint(5, 300, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
    found, end = [], 0
    with torch.no_grad():
        for piece in ids.split(lengths, dim=1):
            end += piece.shape[1]
            options: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :end]}
            options |= {cache_name(model.forward): cache, "use_cache": True}
            found.append(model(input_ids=piece, **options).logits)
    return torch.cat(found, dim=1).float()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call of the library."""
    made: list[int] = []
    for module in (module_under_test, convolution):
        monkeypatch.setattr(module, "loaded_library", lambda: made.append(1) or loaded_library())
    return made


@pytest.mark.parametrize("lengths", [(7, 1, 1, 1, 1, 1), (1, 6, 1, 1), (5, 3, 1, 2, 1), (70, 65, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_a_model_answers_as_before(
    calls: list[int], family: str, sizes: dict[str, Any], dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """Prompts, what continues them, and single tokens: two calls of the library a layer."""
    model = tiny_models.tiny_model(family, **sizes).to(dtype)
    want = logits(model, lengths)
    classes = [type(module) for module in layers_of(model)]
    use_native_mamba2(model)
    changed = [type(module) for module in layers_of(model)]
    assert [cls.__mro__[1] for cls in changed] == classes
    calls.clear()
    got = logits(model, lengths)
    assert len(calls) == 2 * len(lengths) * len(changed)
    for mine, others in zip(got.split(lengths, dim=1), want.split(lengths, dim=1), strict=True):
        assert relative(mine, others) <= (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_padding_stays_without_effect(family: str, sizes: dict[str, Any]) -> None:
    model, lengths = tiny_models.tiny_model(family, **sizes), (30, 9)
    mask = torch.ones(2, 39, dtype=torch.long)
    mask[1, :21] = 0
    want = logits(model, lengths, mask)
    use_native_mamba2(model)
    got = logits(model, lengths, mask)
    assert relative(got[0], want[0]) <= 1e-5
    assert relative(got[1, 21:], want[1, 21:]) <= 1e-5


def test_a_state_of_another_size_is_left_alone() -> None:
    model = tiny_models.tiny_model("nemotron_h", ssm_state_size=24)
    use_native_mamba2(model)
    assert not any(map(holds_no_states, layers_of(model)))
    logits(model, (5, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["answer", "state", "gone"])
def test_functions_that_do_something_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: str
) -> None:
    model = tiny_models.tiny_model("granitemoehybrid")
    before = [type(module) for module in layers_of(model)]
    home = sys.modules[before[0].__module__]
    plain: Any = getattr(home, name)

    def another(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        of_scan = isinstance(found, tuple)
        if broken == "answer":
            (found[0] if of_scan else found).mul_(1.01)
        elif of_scan:
            found[1].mul_(1.01)
        else:
            (args[1] if name.startswith("causal") else args[0]).mul_(1.01)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(home, name, None if broken == "gone" else another)
        use_native_mamba2(model)
        assert [type(module) for module in layers_of(model)] == before
    use_native_mamba2(model)
    assert [type(module) for module in layers_of(model)] != before


def test_layers_of_other_kinds_are_left_alone() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), tiny_models.tiny_model("jamba")])
    classes = list(map(type, model.modules()))
    use_native_mamba2(model)
    assert list(map(type, model.modules())) == classes


def test_prompts_need_no_memory_for_states() -> None:
    model = tiny_models.tiny_model("granitemoehybrid")
    for layer in layers_of(model):  # of a width at which transformers' scan takes few tokens
        layer.intermediate_size *= 512
    other = copy.deepcopy(model)
    use_native_mamba2(model)
    assert {state_pieces.piece_tokens(layer) for layer in layers_of(model)} == {LONGEST}
    assert all(SHORTEST <= state_pieces.piece_tokens(layer) < LONGEST for layer in layers_of(other))


def test_copies_and_pickles_stay_what_they_are() -> None:
    model = tiny_models.tiny_model("granitemoehybrid")
    use_native_mamba2(model)
    module = layers_of(model)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert holds_no_states(other)


def test_layers_that_take_pieces_go_on_to_hold_no_states() -> None:
    model = tiny_models.tiny_model("granitemoehybrid")
    use_native_mamba2(model)
    use_state_pieces(model)
    assert all(hasattr(layer, "piece") and holds_no_states(layer) for layer in layers_of(model))


IDS = [5, 17, 300, 42, 7, 99, 260, 31, 8, 64, 12, 77, 140]


@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h"])
def test_a_loaded_model_answers_as_transformers_own(
    make_checkpoint: Callable[..., Path], calls: list[int], caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """One sequence in pieces, and three of several lengths together; nothing is said of packages for GPUs."""
    folder = make_checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [torch.tensor([ids]) for ids in (IDS[:3], IDS, IDS[2:7])]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}
    with torch.inference_mode():
        want = [reference.generate(prompt, do_sample=False, **options)[0, -10:] for prompt in prompts]
    width = len(IDS)
    rows = [nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    mask = torch.cat([torch.arange(width)[None] >= width - prompt.shape[1] for prompt in prompts]).long()
    caplog.clear()
    with moe_local.load(folder, device="cpu", experts="fp32", dense="fp32", context=64, parallel=3) as model:
        assert all(map(holds_no_states, layers_of(model.hf)))
        for layer in layers_of(model.hf):
            layer.piece = 4
        for prompt, ids in zip(prompts, want, strict=True):
            calls.clear()
            assert torch.equal(model.generate(prompt, **options)[0, -10:], ids)
            assert len(calls) >= 2 * len(layers_of(model.hf))
        together = model.generate(torch.cat(rows), attention_mask=mask, **options)[:, -10:]
        assert torch.equal(together, torch.stack(want))
    assert "reference" not in caplog.text
