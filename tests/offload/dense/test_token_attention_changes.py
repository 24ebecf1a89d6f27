"""What is done to a model after its attention modules have been taken: hooks, other weights, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe_local.offload.dense.attention_call import AttentionCall
from moe_local.offload.dense.attention_trial import use_token_attention
from moe_local.offload.dense.token_attention import TokenAttention
from moe_local.offload.dense.token_latent_attention import TokenLatentAttention
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.native.library import library
from support import tiny_models

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

IDS = [5, 17, 300, 42]


class Both:
    """A model as it was, and its copy whose attention runs in the library."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain.requires_grad_(False)
        self.native = copy.deepcopy(plain)
        use_token_attention(self.native)

    def change(self, change: Callable[[Any], Any]) -> None:
        """Do the same to the second layer's attention of each."""
        for hf in (self.plain, self.native):
            change(hf.model.layers[1].self_attn)

    def agree(self) -> bool:
        got, want = logits_of(self.native), logits_of(self.plain)
        assert got.dtype is want.dtype
        bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[got.dtype]
        return bool((got - want).float().norm() <= bound * want.float().norm())


@pytest.fixture
def both() -> Callable[..., Both]:
    return lambda family="mixtral", **config: Both(tiny_models.tiny_model(family, **config))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call of the library."""
    made: list[Any] = []

    def noting(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(self: AttentionCall, *args: Any) -> torch.Tensor:
            made.append(self)
            return plain(self, *args)

        return noted

    for cls in (TokenAttention, TokenLatentAttention):
        monkeypatch.setattr(cls, "__call__", noting(cls.__call__))
    return made


def logits_of(hf: Any) -> torch.Tensor:
    """[T, V], of tokens that come one at a time."""
    kv = make_kv(hf, 1, 16, probe_cache(hf))
    kv.join()
    found = []
    with torch.no_grad():
        for place, token in enumerate(IDS):
            options = {"position_ids": torch.tensor([[place]]), "past_key_values": kv.row(0)}
            found.append(hf(input_ids=torch.tensor([[token]]), **options).logits[0])
            kv.advance(0, 1)
    return torch.cat(found)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)) / 8


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(random(*shape), requires_grad=False)


def doubled(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward of its own for a linear layer, as accelerate's hooks give it."""
    return lambda x: 2 * nn.functional.linear(x, linear.weight)


CHANGES: dict[str, tuple[str, Callable[[Any], Any], bool]] = {
    "a weight in place": ("mixtral", lambda m: m.k_proj.weight.mul_(2), True),
    "a new weight": ("mixtral", lambda m: setattr(m.v_proj, "weight", parameter(32, 64)), True),
    "new data": ("mixtral", lambda m: setattr(m.o_proj.weight, "data", random(64, 64)), True),
    "a new bias": ("qwen2_moe", lambda m: setattr(m.q_proj, "bias", parameter(64)), True),
    "a first bias": ("mixtral", lambda m: setattr(m.q_proj, "bias", parameter(64)), True),
    "no bias any more": ("qwen2_moe", lambda m: setattr(m.k_proj, "bias", None), True),
    "a new norm's weight": ("qwen3_moe", lambda m: setattr(m.q_norm, "weight", parameter(16)), True),
    "another layer": ("mixtral", lambda m: setattr(m, "q_proj", nn.Linear(64, 64)), False),
    "a layer around a layer": (
        "mixtral",
        lambda m: setattr(m, "q_proj", nn.Sequential(m.q_proj, nn.Tanh())),
        False,
    ),
    "a weight in another order": (
        "mixtral",
        lambda m: setattr(m.q_proj, "weight", nn.Parameter(random(64, 64).T, requires_grad=False)),
        False,
    ),
    "another forward": ("mixtral", lambda m: setattr(m.q_proj, "forward", doubled(m.q_proj)), False),
    "another scaling": ("mixtral", lambda m: setattr(m, "scaling", 2 * m.scaling), True),
    "another scaling of latents": ("deepseek_v3", lambda m: setattr(m, "scaling", 4 * m.scaling), True),
    "another epsilon": ("qwen3_moe", lambda m: setattr(m.q_norm, "variance_epsilon", 0.5), False),
    "latents' weight": ("deepseek_v3", lambda m: m.kv_b_proj.weight.mul_(-2), True),
    "a new norm of ranks": ("deepseek_v3", lambda m: setattr(m.q_a_layernorm, "weight", parameter(32)), True),
    "a bias of latents": ("deepseek_v3", lambda m: setattr(m.kv_b_proj, "bias", parameter(128)), False),
    "another norm of latents": (
        "deepseek_v3",
        lambda m: setattr(m, "kv_a_layernorm", nn.LayerNorm(32)),
        False,
    ),
    "another norm": ("qwen3_moe", lambda m: setattr(m, "k_norm", nn.LayerNorm(16)), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_noticed(both: Callable[..., Both], calls: list[Any], name: str) -> None:
    family, change, stays = CHANGES[name]
    pair = both(family)
    assert pair.agree()
    before = logits_of(pair.native)
    with torch.random.fork_rng():
        for hf in (pair.plain, pair.native):
            torch.manual_seed(3)
            change(hf.model.layers[1].self_attn)
    calls.clear()
    assert pair.agree()
    assert len(calls) == len(IDS) * (3 if stays else 2)
    assert not torch.allclose(logits_of(pair.native), before, atol=1e-3)


def test_sinks_are_noticed() -> None:
    module = tiny_models.tiny_model("gpt_oss").requires_grad_(False).model.layers[0].self_attn
    calls = TokenAttention.of(module, torch.float32)
    assert calls is not None
    assert calls.ready(module, torch.float32)
    assert calls._struct.sinks == module.sinks.data_ptr()
    old = module.sinks
    module.sinks = parameter(4)
    assert calls.ready(module, torch.float32)
    assert calls._struct.sinks == module.sinks.data_ptr() != old.data_ptr()
    module.sinks = nn.Parameter(old.bfloat16(), requires_grad=False)
    assert not calls.ready(module, torch.float32)


def test_another_dtype_is_noticed(both: Callable[..., Both], calls: list[Any]) -> None:
    for family in ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2"):
        pair = both(family)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float16):
            for hf in (pair.plain, pair.native):
                hf.to(dtype)
            calls.clear()
            assert pair.agree(), (family, dtype)
            assert len(calls) == 3 * len(IDS)


def test_the_dtype_is_noticed_even_where_addresses_stay() -> None:
    """As when memory of the same size is freed and given out again."""
    module = tiny_models.tiny_model("mixtral").requires_grad_(False).bfloat16().model.layers[0].self_attn
    calls = TokenAttention.of(module, torch.bfloat16)
    assert calls is not None
    assert calls.ready(module, torch.bfloat16)
    formats = {calls._struct.q.format}
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        linear.weight.data = linear.weight.data.view(torch.float16)
    assert calls.ready(module, torch.float16)
    formats.add(calls._struct.q.format)
    assert len(formats) == 2


def test_hooks_of_the_module_see_its_calls(both: Callable[..., Both], calls: list[Any]) -> None:
    seen: list[Any] = []
    pair = both()

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        seen.append("before")
        return args, {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    def after(module: Any, args: Any, output: Any) -> Any:
        seen.append("after")
        return 3 * output[0], *output[1:]

    pair.change(lambda module: module.register_forward_pre_hook(before, with_kwargs=True))
    pair.change(lambda module: module.register_forward_hook(after))
    calls.clear()
    assert pair.agree()
    assert len(calls) == 3 * len(IDS)
    assert seen.count("before") == seen.count("after") >= 2 * len(IDS)


@pytest.mark.parametrize("part", ["q_proj", "k_norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_its_parts_do_too_and_the_library_waits(
    both: Callable[..., Both], calls: list[Any], part: str, kind: str
) -> None:
    pair, seen, handles = both("qwen3_moe"), [], []

    def hook(*given: Any) -> None:
        seen.append(given)

    pair.change(lambda module: handles.append(getattr(getattr(module, part), kind)(hook)))
    calls.clear()
    assert pair.agree()
    assert len(seen) >= 2 * len(IDS)
    assert len(calls) == 2 * len(IDS)
    for handle in handles:
        handle.remove()
    calls.clear()
    logits_of(pair.native)
    assert len(calls) == 3 * len(IDS)


@pytest.mark.parametrize("how", ["copy", "pickle"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_copies_have_weights_of_their_own(
    both: Callable[..., Both], calls: list[Any], how: str, family: str
) -> None:
    native = both(family).native
    want = logits_of(native)
    other = copy.deepcopy(native) if how == "copy" else pickle.loads(pickle.dumps(native))
    calls.clear()
    assert torch.equal(logits_of(other), want)
    assert len(calls) == 3 * len(IDS)
    for one, two in zip(native.modules(), other.modules(), strict=True):
        assert type(one) is type(two)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(-0.5)
    assert not torch.allclose(logits_of(other), want, atol=1e-2)
    assert torch.equal(logits_of(native), want)
    del native
    logits_of(other)
