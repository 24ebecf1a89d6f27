"""A trial at load: whether the grouped GPU kernels compute the same as the CPU's.

The kernels are compiled on the user's machine, by its version of Triton for its GPU, and no later trial would
notice wrong numbers: the trial of graphs uses stand-ins for experts, and misses that the device fetches by
itself are computed with these same kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moe_local.cache.errors import first_line
from moe_local.offload.gpu.relief import shortage
from moe_local.offload.kernels.contracts import Answers, ExpertMath
from moe_local.offload.kernels.fallback import described
from moe_local.offload.kernels.grouped import MOST_TOKENS, GroupedExperts, warm_up
from moe_local.offload.kernels.launcher import Launcher
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.quantize import nvfp4
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.views import segment_view

EXACT, ROUGH = 1e-3, 0.05
"""The error that is allowed, relative to an answer's norm: in fp32, and in 16-bit dtypes, in which the CPU
rounds between the matrices and a GPU does not. Errors of wrong kernels are a large part of the norm."""

SIZES = {"int8": 3e-4, "fp8": 0.05}
"""The scales that make weights about as large as a model's, by format; 0.02 for all others."""

MakeAnswers = Callable[[ExpertMath, torch.Tensor, Routing, Layout], Answers]

logger = logging.getLogger(__name__)


def try_out(
    grouped: GroupedExperts,
    layout: Layout,
    *,
    math: ExpertMath,
    base: torch.Tensor,
    top_k: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Compile and test the kernels for a layout that `grouped` serves, and refuse them if they are wrong.

    Takes the arguments of `fault`. Logs a warning if they are wrong. Does nothing if already refused.
    """
    device = base.device
    if grouped.launcher(math, device, layout) is None:
        return
    answers = LayerKernels().answers  # a separate instance, since it caches slots by their addresses

    def reason() -> str | None:
        launcher = grouped.launcher(math, device, layout)
        assert launcher is not None
        return fault(launcher, math=math, base=base, top_k=top_k, width=width, dtype=dtype, answers=answers)

    wrong = reason()
    if wrong is not None and grouped.shuffles(device, layout):
        logger.info("kernels for %s on %s do without shuffles: %s", described(layout), device, wrong)
        grouped.stop_shuffling(device, layout)
        wrong = reason()
    if wrong is not None:
        grouped.refuse(device, layout)
        logger.warning(
            "experts in %s are computed one by one on %s, which is slower, since their grouped kernels do "
            "not do: %s",
            described(layout),
            device,
            wrong,
        )


class _OnHost(NamedTuple):
    """A Readable in RAM."""

    buffer: torch.Tensor
    layout: Layout
    expert: int = 0
    on_host: bool = True


def fault(
    launcher: Launcher,
    *,
    math: ExpertMath,
    base: torch.Tensor,
    top_k: int,
    width: int,
    dtype: torch.dtype,
    answers: MakeAnswers,
) -> str | None:
    """What is wrong with the kernels, compared with the CPU on a made-up expert, or None.

    Compiles everything that decode steps launch, which takes seconds. `base`: a slot of `launcher`'s layout,
    which nobody else may use meanwhile; its contents are restored. `width`: the model's. `answers`:
    LayerKernels.answers or the like. Out-of-memory errors are raised.
    """
    layout = launcher.layout
    made = made_expert(layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MOST_TOKENS, width, generator=generator).to(dtype)
    slot = base[: layout.nbytes]
    kept = slot.to("cpu", copy=True)
    slot.copy_(made)
    try:
        found = warm_up(launcher, x.to(base.device), top_k, base)
        wanted = torch.empty(MOST_TOKENS, width)
        routing = Routing([0] * MOST_TOKENS, MOST_TOKENS, 1)
        answers(math, x, routing, layout).compute([_OnHost(made, layout)], wanted)
        off = difference([each.cpu() for each in found], wanted)
    except Exception as error:  # compilers and launches raise all kinds of errors
        if shortage(error) is not None:
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        slot.copy_(kept)
    allowed = EXACT if dtype == torch.float32 else ROUGH
    if not off <= allowed:
        return f"their answers were off by {off:.2g} of their norm, where {allowed} is allowed"
    return None


def difference(found: Sequence[torch.Tensor], wanted: torch.Tensor) -> float:
    """The largest error of an answer, relative to its norm, or NaN. Each of `found`, [n, D], has the answers
    for the first n tokens of `wanted`."""
    off = [(each - wanted[: len(each)]).norm(dim=1) / wanted[: len(each)].norm(dim=1) for each in found]
    return float(torch.cat(off).max())


def made_expert(layout: Layout) -> torch.Tensor:
    """An expert in RAM, uint8, with random weights about as large as a model's: its codes are random bytes,
    and its scales are random, so that a wrong one would be noticed."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator)
    size = SIZES.get(layout.format, 0.02)
    for segment in layout.segments:
        view = segment_view(made, segment)
        if segment.dtype in ("float32", "bfloat16", "float16"):
            view.copy_(size * (0.5 + torch.rand(view.shape, generator=generator)))
            if segment.part == nvfp4.DIVISOR:
                view.reciprocal_()
        elif segment.dtype == "float8_e4m3fn":
            view.view(torch.uint8).bitwise_and_(0xBF)  # avoids the code of NaN
        elif segment.part == "scale" and layout.format in ("mxfp4", "fp8"):  # exponents
            view.remainder_(4).add_(118)
    return made
