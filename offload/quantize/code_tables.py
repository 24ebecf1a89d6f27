"""The numbers that bitsandbytes' codes stand for, made here, since importing it takes seconds."""

from __future__ import annotations

from functools import cache

import torch

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
DECADES = 7


@cache
def nf4_levels(device: torch.device) -> torch.Tensor:
    """The sixteen levels of NF4, ascending, float32 [16], created once per device; read only.

    Quantiles of the normal distribution, as published with QLoRA (arXiv 2305.14314, appendix E).
    """
    return torch.tensor(_NF4, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The signed 8-bit dynamic map, ascending, float32 [256], created once per device; read only.

    Bit-equal to bitsandbytes.functional.create_dynamic_map. Of seven decades, the lowest has one number of
    either sign, and each higher one has twice as many as the previous one: the midpoints of equal parts of
    the interval from 0.1 to 1 times the decade's size. 0 and 1 are added. "8-Bit Approximations for
    Parallelism in Deep Learning" (arXiv 1511.04561).
    """
    numbers = [0.0, 1.0]
    for decade in range(DECADES):
        ends = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        size = 10 ** (decade - DECADES + 1)
        middles = (size * ((ends[:-1] + ends[1:]) / 2)).tolist()
        numbers += middles
        numbers += [-number for number in middles]
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)
