"""The grouped kernels and the GPU's own fetching, by torch: Triton's interpreter takes minutes for a test.

What the kernels promise (offload/kernels/launcher.py, fetch.py) from decoded weights, on the emulated GPU's
memory. EMULATED_CUDA_KERNELS=triton runs the kernels themselves, in the interpreter.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import emulated_operators as emulated
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_local.offload.kernels import triton_experts as triton
from moe_local.offload.kernels.fetch import LOG_HEAD, UNIT, TritonFetch
from moe_local.offload.kernels.launcher import Launcher
from moe_local.offload.quantize.codec import decoder_for

FUNCTIONS = {
    triton.IDENTITY.value: lambda x: x,
    triton.RELU.value: torch.relu,
    triton.RELU2.value: lambda x: torch.relu(x) ** 2,
    triton.SILU.value: F.silu,
    triton.GELU.value: F.gelu,
    triton.GELU_TANH.value: lambda x: F.gelu(x, approximate="tanh"),
}


def _put(work: Any, *args: Any) -> None:
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    shown = [emulated.shown(arg) if isinstance(arg, Tensor) else arg for arg in args]
    emulated.put(device.index, lambda: work(*shown))


def _bytes_at(address: int, nbytes: int) -> Tensor:
    """Slots may lie in other segments than the first one, so that no tensor has them all."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def _experts(launcher: Launcher, base: Tensor, stride: int, table: Tensor) -> Any:
    """For each row of the table that has tokens: their places and the expert's decoded weights."""
    layout = launcher.layout
    for slot, *places in table.tolist():
        places = [place for place in places if place >= 0]
        if places:
            buffer = _bytes_at(base.data_ptr() + slot * stride, layout.nbytes)
            yield places, decoder_for(layout.format).decode(buffer, layout, torch.float32)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor, has_bias: bool) -> Tensor:
    return F.linear(x, weights[name], weights[f"{name}_bias"] if has_bias else None)


def _gate(constants: dict[str, Any], x: Tensor) -> Tensor:
    arrangement, function = constants["ARRANGEMENT"], constants["FUNCTION"]
    if arrangement == triton.PLAIN.value:
        return FUNCTIONS[function](x)
    gate, up = (x[:, ::2], x[:, 1::2]) if arrangement == triton.INTERLEAVED.value else x.chunk(2, 1)
    if function in (triton.CLAMPED_SWIGLU.value, triton.CLAMPED_SILU.value):
        limit = constants["LIMIT"]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if function == triton.CLAMPED_SILU.value:
            return F.silu(gate) * up
        return gate * torch.sigmoid(constants["ALPHA"] * gate) * (up + 1)
    return FUNCTIONS[function](gate) * up


def _up(
    self: Launcher, base: Tensor, stride: int, table: Tensor, planes: Tensor, hidden: Tensor, top_k: int
) -> None:
    name = "gate_up_proj" if self._rows_a_feature == 2 else "up_proj"

    def work(base: Tensor, table: Tensor, planes: Tensor, hidden: Tensor) -> None:
        x = planes.transpose(1, 2).flatten(1)
        for places, weights in _experts(self, base, stride, table):
            tokens = [place // top_k for place in places]
            found = _gate(self._up, _linear(weights, name, x[tokens], self._up["BIAS"] >= 0))
            hidden[places] = found.view(len(places), -1, planes.shape[1]).transpose(1, 2).flatten(1)

    _put(work, base, table, planes, hidden)


def _down(self: Launcher, base: Tensor, stride: int, table: Tensor, hidden: Tensor, outputs: Tensor) -> None:
    def work(base: Tensor, table: Tensor, hidden: Tensor, outputs: Tensor) -> None:
        for places, weights in _experts(self, base, stride, table):
            x = hidden[places].view(len(places), self._format.per_word, -1).transpose(1, 2).flatten(1)
            outputs[places] = _linear(weights, "down_proj", x, self._down["BIAS"] >= 0)

    _put(work, base, table, hidden, outputs)


def _combine(self: Launcher, outputs: Tensor, weights: Tensor, combined: Tensor) -> None:
    def work(outputs: Tensor, weights: Tensor, combined: Tensor) -> None:
        ranked = outputs.view(*weights.shape, -1) * weights.float()[..., None]
        total = ranked[:, 0]
        for rank in range(1, weights.shape[1]):
            total = total + ranked[:, rank]
        combined.copy_(total)

    _put(work, outputs, weights, combined)


def _bring(self: TritonFetch, tables: Any, memory: Tensor, base: Tensor, nbytes: int) -> None:
    def work(offsets: Tensor, sources: Tensor, log: Tensor, memory: Tensor, base: Tensor) -> None:
        top_k = (len(log) - LOG_HEAD) // 2
        log[1] = log[2] = time.perf_counter_ns()
        for expert, slot in zip(*log[LOG_HEAD:].view(2, top_k).tolist(), strict=True):
            if slot >= 0:
                to, source = int(offsets[slot]) * UNIT, int(sources[expert])
                _bytes_at(base.data_ptr() + to, nbytes).copy_(_bytes_at(memory.data_ptr() + source, nbytes))
                log[2] = time.perf_counter_ns()

    _put(work, tables.offsets, tables.sources, tables.log, memory, base)


def install() -> None:
    Launcher.up, Launcher.down, Launcher.combine = _up, _down, _combine  # type: ignore[method-assign]
    TritonFetch.bring = _bring  # type: ignore[method-assign]
