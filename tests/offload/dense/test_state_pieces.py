"""Prompts through layers with a state in pieces, against transformers' own way through them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_local.offload.checkpoint.spec import model_spec
from moe_local.offload.dense import state_pieces as module_under_test
from moe_local.offload.dense.state_pieces import (
    LONGEST,
    SHORTEST,
    forgets_states,
    piece_tokens,
    selective_scan,
    use_state_pieces,
)
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.plan.footprint import kv_bytes
from support import tiny_models

SCANNED = ["jamba", "granitemoehybrid", *(["nemotron_h"] if "nemotron_h" in CONFIG_MAPPING else [])]
FAMILIES = ["qwen3_next", "qwen3_5_moe", "lfm2_moe", *SCANNED]
TOKENS = 90


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[Any, Any]]:
    """Of a family: the model as transformers makes it, and in pieces. Each is made once."""

    @functools.cache
    def pair(family: str) -> tuple[Any, Any]:
        plain = tiny_models.tiny_model(family)
        hf = copy.deepcopy(plain)
        use_state_pieces(hf)
        assert layers(hf)
        return plain, hf

    return pair


@pytest.fixture
def plain(family: str, made: Callable[[str], tuple[Any, Any]]) -> Any:
    return made(family)[0]


@pytest.fixture
def hf(family: str, made: Callable[[str], tuple[Any, Any]]) -> Any:
    return made(family)[1]


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "piece")]


def cut(model: Any, tokens: int) -> None:
    for layer in layers(model):
        layer.piece = tokens


def logits(
    model: Any, cuts: Sequence[int] = (), *, mask: torch.Tensor | None = None, tokens: int = TOKENS
) -> torch.Tensor:
    """Of one prompt, or of two with a mask, in several forwards if there are `cuts`."""
    config = model.config.get_text_config(decoder=True)
    rows = 1 if mask is None else len(mask)
    ids = torch.arange(3, 3 + rows * tokens).view(rows, tokens) % 300
    options: dict[str, Any] = {cache_name(model.forward): DynamicCache(config=config), "use_cache": True}
    found, ends = [], [*cuts, tokens]
    with torch.no_grad():
        for first, end in zip([0, *cuts], ends, strict=True):
            seen = {} if mask is None else {"attention_mask": mask[:, :end]}
            found.append(model(input_ids=ids[:, first:end], **seen, **options).logits)
    return torch.cat(found, dim=1)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Sums that decay are rounded in another order; logits are up to 13."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("piece", [64, 7, TOKENS - 1])
def test_pieces_change_nothing(plain: Any, hf: Any, piece: int) -> None:
    """The last one may be a single token."""
    cut(hf, piece)
    want = logits(plain)
    close(logits(hf), want)
    close(logits(hf, [40, 41]), want)


def test_a_piece_lies_in_memory_as_a_prompt_of_its_length(hf: Any) -> None:
    """With other strides, torch copies the weights of a linear layer that have no gradients."""
    cut(hf, 16)
    seen: list[tuple[int, ...]] = []
    linear = next(module for module in layers(hf)[0].modules() if isinstance(module, nn.Linear))
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    logits(hf)
    hook.remove()
    width = seen[0][1]
    assert set(seen) == {(16 * width, width, 1), (TOKENS % 16 * width, width, 1)}


def test_padding_is_cut_with_its_tokens(plain: Any, hf: Any) -> None:
    cut(hf, 16)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :21] = 0
    want, got = logits(plain, mask=mask), logits(hf, mask=mask)
    close(got[0], want[0])
    close(got[1, 21:], want[1, 21:])


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has which an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("family", ["jamba", "granitemoehybrid"])
def test_no_state_is_kept_for_every_token(plain: Any, hf: Any) -> None:
    cut(hf, SHORTEST)
    states = 512 * min(map(module_under_test.state_numel, layers(hf)))
    for layer in layers(hf):
        if hasattr(layer, "chunk_size"):
            layer.chunk_size = SHORTEST
    with Largest() as whole:
        logits(plain, tokens=512)
    with Largest() as pieces:
        logits(hf, tokens=512)
    assert pieces.numel < min(states, 250_000) < whole.numel


@pytest.mark.parametrize("family", ["jamba"])
def test_a_scan_that_forgets_is_replaced(plain: Any, hf: Any) -> None:
    """transformers' begins at zero when it gets several tokens after a state: a prompt was one forward."""
    assert forgets_states(plain)
    assert not forgets_states(hf)
    for model, chunk in ((plain, 70), (hf, 16)):
        kv = make_kv(model, 1, 100)
        assert kv.chunk(kv.join(), 70, 16) == chunk


@pytest.mark.parametrize("begun", [False, True])
def test_the_scan_is_the_recurrence(begun: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    (x, dt, z), (b, c) = (draw(2, 6, 11) for _ in range(3)), (draw(2, 4, 11) for _ in range(2))
    a, d, bias, begin = -draw(6, 4).abs(), draw(6), draw(6), draw(2, 6, 4)
    state = begin.clone() if begun else torch.zeros(2, 6, 4, dtype=torch.double)
    wanted = []
    for t in range(11):
        step = torch.nn.functional.softplus(dt[..., t] + bias)
        state = (step[..., None] * a).exp() * state + step[..., None] * b[:, None, :, t] * x[..., t, None]
        y = (state * c[:, None, :, t]).sum(-1) + d * x[..., t]
        wanted.append(y * torch.nn.functional.silu(z[..., t]))
    output, last = selective_scan(
        begin.float() if begun else None,
        *(tensor.float() for tensor in (x, dt, a, b, c)),
        D=d.float(),
        z=z.float(),
        delta_bias=bias.float(),
        delta_softplus=True,
        return_last_state=True,
    )
    torch.testing.assert_close(output.double(), torch.stack(wanted, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), state, rtol=1e-5, atol=1e-5)
    assert last.untyped_storage().nbytes() == last.nbytes, "the states of all tokens would be kept with it"


def test_what_memory_is_planned_for_states(family: str, plain: Any) -> None:
    spec = model_spec(tiny_models.tiny_config(family))
    assert spec.state_numel > 0
    kv = make_kv(plain, 2, 100)
    assert kv.nbytes == 2 * kv_bytes(spec, 100, torch.float32)


def test_copies_and_pickles_go_on(hf: Any) -> None:
    layer = layers(hf)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.piece == layer.piece


@pytest.mark.parametrize("changed", [True, False])
def test_what_comes_out_differently_stays(
    plain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: bool
) -> None:
    """Also where the model fails before it is changed."""

    def differs(model: Any, change: Any) -> str:
        if changed:
            change()
        assert bool(layers(model)) == changed
        return "logits were off"

    monkeypatch.setattr(module_under_test, "difference", differs)
    caplog.set_level("INFO", logger="moe_local")
    model = copy.deepcopy(plain)
    use_state_pieces(model)
    assert not layers(model)
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))
    assert "in one piece: logits were off" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ({"num_v_heads": 32, "head_k_dim": 128, "head_v_dim": 128}, LONGEST),  # Qwen3-Next
        ({"intermediate_size": 8192, "ssm_state_size": 16}, 128),  # Jamba 1.5 Mini
        ({"intermediate_size": 3072, "ssm_state_size": 128}, 32),  # Granite 4.0 H Tiny
        ({"intermediate_size": 8192, "ssm_state_size": 256}, SHORTEST),
        ({}, LONGEST),
    ],
)
def test_pieces_of_large_states_are_short(sizes: dict[str, int], tokens: int) -> None:
    assert piece_tokens(type("Layer", (), sizes)()) == tokens
