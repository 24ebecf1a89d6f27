"""One expert's feed-forward on some tokens, straight from its flat buffer.

It takes the fused path if there is one for the device and format, and otherwise `kernels.reference`, which
all paths are tested against.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from moe_local.offload.kernels import cpu
from moe_local.offload.kernels.contracts import ExpertMath, Linear
from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.quantize.codec import decoder_for
from moe_local.offload.quantize.layout import Layout


class ExpertKernels:
    """Computes experts in the slots of one store, and caches the views by which it reads each slot.

    Making the views of a tiny expert's matrices takes longer than multiplying with them. The views show
    whatever expert is in the slot. They are dropped as soon as nobody else holds the slot, since they would
    keep memory alive that an arena gives back. Converted weights are not cached. There is one instance per
    store, since slots are identified by their addresses.
    """

    def __init__(self, activations: str = "native") -> None:
        """`activations`: "native", or "int8" to round them to eight bits if the kernel can."""
        self._activations = activations
        self._linears: dict[int, _Known] = {}

    def forward(
        self, math: ExpertMath, x: torch.Tensor, buffer: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """One expert on tokens x [T, D] -> [T, D], in the dtype and on the device of x.

        `buffer` is the expert's slot, uint8 on the device of x, read in place while this runs.
        """
        address = buffer.data_ptr()
        known = self._linears.get(address)
        if known is not None and known.layout is layout and known.dtype is x.dtype:
            return _feed_forward(math, x, known.linear)
        made = _prepare(x, buffer, layout, math.has_bias, self._activations)
        if made.in_place:
            slot = weakref.ref(buffer, lambda slot: self._forget(address, slot))
            self._linears[address] = _Known(slot, layout, x.dtype, made.linear)
        return _feed_forward(math, x, made.linear)

    def _forget(self, address: int, slot: weakref.ref[torch.Tensor]) -> None:
        if address in self._linears and self._linears[address].slot is slot:
            del self._linears[address]


class _Known(NamedTuple):
    """How to read the bytes of a slot that is still in use."""

    slot: weakref.ref[torch.Tensor]
    layout: Layout
    dtype: torch.dtype
    linear: Linear


def _feed_forward(math: ExpertMath, x: torch.Tensor, linear: Linear) -> torch.Tensor:
    hidden = math.activate(linear(x, "gate_up_proj" if math.has_gate else "up_proj"))
    return math.finish(linear(hidden, "down_proj"))


class _Prepared(NamedTuple):
    """How to read the bytes of a slot."""

    linear: Linear
    in_place: bool
    """Whether `linear` only has views of the slot, so that it serves any expert of this layout in the
    slot."""


def _prepare(
    x: torch.Tensor, buffer: torch.Tensor, layout: Layout, has_bias: bool, activations: str
) -> _Prepared:
    if layout.format == "nf4" and x.is_cuda:
        from moe_local.offload.kernels.bnb import nf4_linear

        return _Prepared(nf4_linear(buffer, layout, x.dtype, has_bias), in_place=not has_bias)
    if cpu.serves(layout, x):
        return _Prepared(cpu.cpu_linear(buffer, layout, has_bias, activations), in_place=True)
    weights = decoder_for(layout.format).decode(buffer, layout, x.dtype)
    slot = buffer.untyped_storage().data_ptr()
    in_place = all(weight.untyped_storage().data_ptr() == slot for weight in weights.values())
    return _Prepared(reference_linear(weights, has_bias), in_place)
