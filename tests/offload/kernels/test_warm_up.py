"""No decode step launches a kernel that was not compiled when the model was loaded."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.offload import experts as experts_module
from moe_local.offload.kernels import grouped, grouped_trial
from moe_local.offload.kernels.gates import CONCATENATED, FUNCTIONS
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import Gate
from support import swiglu_experts
from support.expert_math import Lease

FORMATS = ("nf4", "int8", "q3", "q2", "mxfp4", "fp8", "nvfp4", "nvfp4, divided")
EXPERTS = len(FORMATS)

UNALIGNED = {"combine_kernel": {1}}
"""Arguments whose alignment a kernel is not compiled for; test_triton.py sees that this is so."""


class Kernel:
    """Notes what Triton would compile a kernel for: dtypes, alignment, integers of note, and constants."""

    def __init__(self, name: str, seen: set[Any]) -> None:
        self._name = name
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 1 << 16 for size in grid[1:])
        assert 0 < grid[0] < 1 << 31

        def launch(*arguments: Any, **constants: Any) -> None:
            kinds: list[Any] = []
            for at, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor):
                    free = at in UNALIGNED.get(self._name, ())
                    kinds.append((argument.dtype, free or argument.data_ptr() % 16 == 0))
                else:
                    kinds.append((argument == 1, argument % 16 == 0, argument.bit_length() < 32))
            self._seen.add((self._name, *kinds, *sorted(constants.items())))

        return launch


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Variants of kernels that were launched."""
    found: set[Any] = set()
    names = ("up_kernel", "down_kernel", "combine_kernel")
    kernels = SimpleNamespace(**{name: Kernel(name, found) for name in names})
    monkeypatch.setattr(grouped, "triton_kernels", lambda device: kernels)
    silu = Gate(CONCATENATED, FUNCTIONS.index("silu"), 0.0, 0.0)
    monkeypatch.setattr(grouped, "recognize", lambda math: silu)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_variant_of_a_decode_step_is_compiled_at_load(
    seen: set[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, of which the first has experts of every format: all numbers of tokens, groups of any kind,
    routers whose weights have their model's dtype or not and start anywhere."""
    layout_of, width = swiglu_experts.layout_of, swiglu_experts.WIDTH
    kinds = [[layout_of(format) for format in FORMATS], [layout_of("nf4")]]
    arena = torch.zeros(2 * EXPERTS, max(layout.nbytes for layout in kinds[0]) + 256, dtype=torch.uint8)
    start = -arena.data_ptr() % 16  # torch on a GPU aligns to 512
    top_ks, maths = (2, 3), [swiglu_experts.Math(0), swiglu_experts.Math(1)]
    slots = [
        arena.flatten()[start + slot * arena.shape[1] :][: arena.shape[1]] for slot in range(len(arena) - 1)
    ]
    runner = swiglu_experts.runner_of(kinds, top_ks, slots)
    modules: Any = maths
    monkeypatch.setattr(
        grouped_trial, "difference", lambda found, wanted: 0.0
    )  # these kernels compute nothing
    runner.warm_up(modules, width, dtype)
    compiled = set(seen)
    # A pair of kernels for each layout of a layer and number of tokens; the sum for each dtype of weights.
    assert len(compiled) == 2 * 4 * len(FORMATS) + 4 + (1 if dtype == torch.float32 else 2) * len(set(top_ks))
    rng = random.Random(0)
    for tokens in (*range(1, 10), 33, grouped.DECODE_TOKENS):
        for layer, weighted in ((0, dtype), (0, torch.float32), (1, dtype), (1, torch.float32)):
            top_k, layouts = top_ks[layer], kinds[layer]
            ids = [expert for _ in range(tokens) for expert in rng.sample(range(EXPERTS), top_k)]
            routing = Routing(ids, tokens, EXPERTS)
            weights = torch.zeros(tokens * top_k + 1, dtype=weighted)[1:].view(tokens, top_k)
            leases = {e: Lease(e, slots[e], layouts[e % len(layouts)]) for e in routing.experts}
            rest: Any = lambda outputs: SimpleNamespace(compute=lambda group: None)  # noqa: E731
            step = runner.grouped.begin(
                maths[layer], torch.zeros(tokens, width, dtype=dtype), routing, weights, layouts[0], rest
            )
            cut = rng.randrange(len(leases))
            for group in ([*leases.values()][:cut], [*leases.values()][cut:]):
                if group:
                    step.compute(group)
            step.result()
    assert seen == compiled


def test_each_card_and_each_number_of_experts_is_warmed_up(
    seen: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[tuple[str, int, str]] = []
    monkeypatch.setattr(
        experts_module,
        "try_out",
        lambda grouped, layout, *, base, top_k, **rest: warmed.append(
            (base.device.type, top_k, layout.format)
        ),
    )
    nf4, int8 = map(swiglu_experts.layout_of, ("nf4", "int8"))
    here, there = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8, device="meta")
    runner = swiglu_experts.runner_of(
        [[nf4], [nf4, int8], [nf4], [nf4]], [2, 2, 4, 2], [here, here, here, there]
    )
    modules: Any = [swiglu_experts.Math(index) for index in range(4)]
    reports: list[tuple[str, int, int]] = []
    runner.warm_up(modules, swiglu_experts.WIDTH, torch.float32, lambda *report: reports.append(report))
    assert reports == [(experts_module.COMPILING, done, 4) for done in range(5)]
    assert warmed == [("cpu", 2, "nf4"), ("cpu", 2, "int8"), ("cpu", 4, "nf4"), ("meta", 2, "nf4")]
