"""What stands between an expert's matrices: the library's gates against torch's, and recognizing them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from moe_local.offload.checkpoint.spec import experts_modules, is_experts_module
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.kernels.gates import (
    CONCATENATED,
    FUNCTIONS,
    INTERLEAVED,
    PLAIN,
    apply_gate,
    recognize,
)
from moe_local.offload.native.library import ISAS, Gate, library, loaded_library
from support import tiny_models

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def needs_the_library() -> None:
    if library() is None:
        pytest.skip("the C++ library was not compiled")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    lib = loaded_library()
    before = lib.moe_isa()
    if lib.moe_set_isa(ISAS.index(request.param)) != 0:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    lib.moe_set_isa(before)


class Math:
    """An architecture's activation, of (gate, up) or of one tensor."""

    has_bias = False

    def __init__(
        self, function: Callable[..., torch.Tensor], arrangement: int = CONCATENATED, **numbers: Any
    ):
        self._function, self._arrangement = function, arrangement
        self.has_gate = arrangement != PLAIN
        vars(self).update(numbers)

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._arrangement == PLAIN:
            return self._function(hidden)
        return self._function(*split(hidden, self._arrangement))

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return output


def split(hidden: torch.Tensor, arrangement: int) -> tuple[torch.Tensor, ...]:
    if arrangement == INTERLEAVED:
        return hidden[..., ::2], hidden[..., 1::2]
    return hidden.chunk(2, dim=-1)


def gating(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: ACTIVATIONS[name](gate) * up


def clamped_swiglu(alpha: float, limit: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def activate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)

    return activate


def clamped_silu(limit: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def numbers(rows: int, cols: int) -> torch.Tensor:
    """From tiny to huge, and those at the edges."""
    generator = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, cols, generator=generator) * 10 ** torch.empty(rows, cols).uniform_(
        -4, 2, generator=generator
    )
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-30, 88.0, -88.0, 90.0, -90.0, 300.0, -300.0, 3e4, -3e4])
    x.view(-1)[: min(edges.numel(), x.numel())] = edges[: x.numel()]
    return x


@pytest.mark.parametrize("arrangement", [PLAIN, CONCATENATED, INTERLEAVED])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_are_torchs(isa: str, name: str, arrangement: int) -> None:
    for width in (1, 3, 4, 15, 16, 17, 33, 256):
        hidden = numbers(3, width if arrangement == PLAIN else 2 * width)
        got = apply_gate(Gate(arrangement, FUNCTIONS.index(name), 0, 0), hidden)
        want = Math(gating(name) if arrangement else ACTIVATIONS[name], arrangement).activate(hidden.double())
        first, up = split(hidden.double(), arrangement) if arrangement else (hidden.double(), torch.ones(()))
        # The gelus lose what 1 + erf and 1 + tanh cancel, as torch's own in fp32 do; and silu ends at -87.
        lost = (2e-7 * first.abs() + 1e-44 if "gelu" in name else 2e-36) * (up.abs() + 1)
        assert ((got.double() - want).abs() <= 1e-6 * want.abs() + lost).all()


@pytest.mark.parametrize("arrangement", [CONCATENATED, INTERLEAVED])
def test_the_clamped_gate_is_deepseek_v4s(isa: str, arrangement: int) -> None:
    for limit, width in product((10.0, 0.5), (1, 16, 37)):
        hidden = numbers(3, 2 * width)
        got = apply_gate(Gate(arrangement, FUNCTIONS.index("clamped_silu"), 0, limit), hidden)
        want = Math(clamped_silu(limit), arrangement).activate(hidden.double())
        assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-34)


@pytest.mark.parametrize("arrangement", [CONCATENATED, INTERLEAVED])
def test_the_clamped_gate_is_gpt_oss_own(isa: str, arrangement: int) -> None:
    for alpha, limit in ((1.702, 7.0), (0.5, 1.0), (1.0, 0.0)):
        for width in (1, 16, 37):
            hidden = numbers(3, 2 * width)
            got = apply_gate(Gate(arrangement, FUNCTIONS.index("clamped_swiglu"), alpha, limit), hidden)
            want = Math(clamped_swiglu(alpha, limit), arrangement).activate(hidden.double())
            # alpha * gate is rounded before it becomes an exponent.
            assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "clamped_swiglu", "clamped_silu"])
def test_what_is_no_number_stays_none(isa: str, name: str) -> None:
    function = FUNCTIONS.index(name)
    for place in (0, 20, 32, 52):  # of gate and up, in whole vectors and after them
        hidden = torch.ones(1, 64)
        hidden[0, place] = float("nan")
        got = apply_gate(Gate(CONCATENATED, function, 1.702, 7.0), hidden)
        assert got[0, place % 32].isnan()
        assert got.isnan().sum() == 1
    if name != "gelu":  # torch's own of infinity depends on the processor
        hidden = torch.tensor([[float("inf"), -float("inf"), 2.0, 2.0]])
        clamped = {"clamped_swiglu": clamped_swiglu(1.702, 7.0), "clamped_silu": clamped_silu(7.0)}
        wanted = clamped[name] if name in clamped else gating(name)
        got = apply_gate(Gate(CONCATENATED, function, 1.702, 7.0), hidden)
        assert torch.allclose(got, wanted(*hidden.chunk(2, dim=-1)), equal_nan=True)


def test_the_exponential_is_right_to_a_few_units_in_the_last_place(isa: str) -> None:
    """Through silu over all of its range; below -87.3 it is as good as zero."""
    for low, high in ((-87.3, 88.0), (-2.0, 2.0), (-1e-3, 1e-3)):
        x = torch.linspace(low, high, 200_001).unsqueeze(0)
        got = apply_gate(Gate(PLAIN, FUNCTIONS.index("silu"), 0, 0), x).double()
        want = x.double() * torch.sigmoid(x.double())
        assert ((got - want).abs() <= 4 * 2.0**-24 * want.abs() + 1e-44).all()
    small = apply_gate(Gate(PLAIN, FUNCTIONS.index("silu"), 0, 0), torch.linspace(-1e4, -87.3, 1001)[None])
    assert (small.abs() < 2e-36).all()
    assert (small <= 0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_recognized_by_what_it_does(name: str) -> None:
    function = FUNCTIONS.index(name)
    for arrangement in (CONCATENATED, INTERLEAVED):
        gate = recognize(Math(gating(name), arrangement))
        assert gate is not None
        assert (gate.arrangement, gate.function) == (arrangement, function)
    gate = recognize(Math(ACTIVATIONS[name], PLAIN))
    assert gate is not None
    assert (gate.arrangement, gate.function) == (PLAIN, function)


@pytest.mark.parametrize("arrangement", [CONCATENATED, INTERLEAVED])
def test_the_clamped_gate_is_recognized_with_its_numbers(arrangement: int) -> None:
    gate = recognize(Math(clamped_swiglu(1.5, 5.0), arrangement, alpha=1.5, limit=5.0))
    assert gate is not None
    assert (gate.arrangement, gate.function) == (arrangement, FUNCTIONS.index("clamped_swiglu"))
    assert (gate.alpha, gate.limit) == (1.5, 5.0)


@pytest.mark.parametrize("arrangement", [CONCATENATED, INTERLEAVED])
@pytest.mark.parametrize("limit", [0.5, 10, 2000.0])
def test_a_clamped_silu_is_recognized_with_its_limit(limit: float, arrangement: int) -> None:
    gate = recognize(Math(clamped_silu(limit), arrangement, swiglu_limit=limit))
    assert gate is not None
    assert (gate.arrangement, gate.function) == (arrangement, FUNCTIONS.index("clamped_silu"))
    assert gate.limit == limit
    assert recognize(Math(clamped_silu(limit), arrangement)) is None


SCALE = torch.tensor(1.001)

UNKNOWN: dict[str, Callable[..., torch.Tensor]] = {
    "quick gelu": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "tanh": lambda gate, up: torch.tanh(gate) * up,
    "leaky relu": lambda gate, up: F.leaky_relu(gate, 0.01) * up,
    "a learned factor": lambda gate, up: F.silu(gate) * up * SCALE,
    "a learned shift": lambda gate, up: F.silu(gate + 0.001) * up,
    "a clamp of the gate": lambda gate, up: F.silu(gate.clamp(max=10)) * up,
    "a clamp from below": lambda gate, up: F.silu(gate.clamp(min=-8)) * up,
    "a clamp of the other": lambda gate, up: F.silu(gate) * up.clamp(-30, 30),
    "gate and other exchanged": lambda gate, up: gate * F.silu(up),
    "a mean over the row": lambda gate, up: F.silu(gate) * up - 1e-3 * gate.mean(dim=-1, keepdim=True),
    "other clamps than its numbers say": clamped_swiglu(1.702, 6.0),
    "too few numbers": lambda gate, up: (gate * up)[..., 1:],
}


@pytest.mark.parametrize("arrangement", [CONCATENATED, INTERLEAVED])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_library_does_not_do_is_not_recognized(name: str, arrangement: int) -> None:
    assert recognize(Math(UNKNOWN[name], arrangement, alpha=1.702, limit=7.0)) is None


def test_an_activation_that_does_not_take_the_probe_is_not_recognized() -> None:
    def fails(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("only 64 columns")

    assert recognize(Math(fails)) is None


def test_something_after_the_down_projection_is_not_recognized() -> None:
    norm = nn.RMSNorm(64)

    class Normed(Math):
        def finish(self, output: torch.Tensor) -> torch.Tensor:
            return norm(output)

    class Scaled(Math):
        def finish(self, output: torch.Tensor) -> torch.Tensor:
            return 3 * output

    assert recognize(Normed(gating("silu"))) is None
    assert recognize(Scaled(gating("silu"))) is None
    assert recognize(Math(gating("silu"), has_post_expert_norm=True)) is None


def agrees(experts: OffloadedExperts) -> bool:
    """Whether the gate of a transformers module is recognized; if so, it must equal it on other numbers."""
    gate = recognize(experts)
    if gate is None:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = 4 * torch.randn(5, 2 * 96 if experts.has_gate else 96, generator=generator)
    assert torch.allclose(apply_gate(gate, hidden), experts.activate(hidden), rtol=1e-5, atol=1e-6)
    return True


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_the_gates_of_common_models_are_recognized(model_type: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_models.tiny_config(model_type))
    for index, (_, module) in enumerate(experts_modules(model)):
        assert agrees(OffloadedExperts(module, index))


def experts_classes() -> Iterator[tuple[ModuleType, type[nn.Module]]]:
    """All that transformers' experts interface serves."""
    for found in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{found.name}.modeling_{found.name}")
        except ImportError:
            continue  # no model, or one that needs what is not installed
        for value in vars(module).values():
            own = (
                isinstance(value, type)
                and issubclass(value, nn.Module)
                and value.__module__ == module.__name__
            )
            if own and value.__name__.endswith("Experts") and hasattr(value, "_apply_gate"):
                yield module, value


def built(module: ModuleType, kind: type[nn.Module]) -> nn.Module | None:
    """The experts by the first of the model's configs that has what they ask for."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "top_k_experts": 2}
    configs = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, transformers.PreTrainedConfig)
    ]
    for config, overrides in [(c, o) for o in ({}, sizes) for c in configs]:
        try:
            with torch.device("meta"):
                made: nn.Module = kind(config(**overrides))  # type: ignore[arg-type]
        except Exception:  # each config fails in its own way where it is not the one
            continue
        if is_experts_module(made):
            return made
    return None


@pytest.mark.slow
def test_no_gate_of_transformers_is_mistaken_for_another() -> None:
    recognized, others, not_built = set(), set(), set()
    for module, kind in experts_classes():
        experts = built(module, kind)
        if experts is None:
            not_built.add(kind.__name__)
        elif agrees(OffloadedExperts(experts, 0)):
            recognized.add(kind.__name__)
        else:
            others.add(kind.__name__)
    assert {"MixtralExperts", "GptOssExperts", "NemotronHExperts", "Gemma4TextExperts"} <= recognized
    if hasattr(transformers.models, "deepseek_v4"):
        assert "DeepseekV4Experts" in recognized
    assert len(recognized) >= 40
    assert len(others) <= 4, others
    assert len(not_built) <= 4, not_built
