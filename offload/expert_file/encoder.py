"""Encodes experts on the CPU or GPU, whichever is faster; errors name the expert."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.checkpoint.spec import MoELayer
from moe_local.offload.gpu.capturing import alone
from moe_local.offload.quantize.codec import Codec, codec_for
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.mix import Mix

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """A format that differs from expert to expert. `name` must differ for every different choice."""

    name: str
    choose: Callable[[ExpertKey], Codec]

    @classmethod
    def of(cls, mix: Mix) -> FormatChoice:
        return cls(mix.name, lambda key: codec_for(mix.formats[key.layer][key.expert]))


class ExpertEncoder:
    """Encodes the experts of one model. The encoded bytes are the same on CPU and GPU.

    With a `gpu`, the first experts of a quantized format are encoded there and on the CPU in turn, and all
    later ones where it took less time: for the GPU, the weights, several times the encoded bytes, have to
    cross the link first. A GPU that runs out of memory is not used again.
    """

    def __init__(self, model: str, codec: Codec | FormatChoice, gpu: torch.device | None = None) -> None:
        self.model = model
        self.codec = codec
        self._places = [CPU] if gpu is None else [gpu, CPU]
        self._trials = [place for _ in range(2) for place in self._places]
        """Devices for the next experts, if there are two. Each has a warm-up, then a trial that counts."""
        self._seconds_per_byte: dict[torch.device, float] = {}
        self._gpu = gpu

    def close(self) -> None:
        """Return torch's cached GPU memory to the driver, since it is planned for other uses."""
        if self._gpu is not None and self._gpu.type == "cuda":
            with alone:
                torch.cuda.empty_cache()

    def codec_of(self, layer: MoELayer, expert: int) -> Codec:
        if isinstance(self.codec, FormatChoice):
            return self.codec.choose(ExpertKey(layer.index, expert))
        return self.codec

    @property
    def place(self) -> torch.device:
        """The device on which the next expert of a quantized format will be encoded."""
        if len(self._places) == 1:
            return self._places[0]
        if self._trials:
            return self._trials[0]
        return min(self._seconds_per_byte, key=self._seconds_per_byte.__getitem__)

    def encode(
        self,
        layer: MoELayer,
        expert: int,
        tensors: Mapping[str, torch.Tensor],
        layout: Layout,
        out: torch.Tensor,
    ) -> None:
        """Write the expert into `out`, uint8 [layout.nbytes] on the CPU.

        Raises CheckpointError, naming the expert, for tensors that are missing, of another shape than the
        layout's, or not to be encoded.
        """
        codec = self.codec_of(layer, expert)
        try:
            _check_shapes(tensors, layout)
            if codec.exact:  # a copy: nothing to be gained elsewhere
                codec.encode(tensors, layout, out)
            else:
                self._encode(codec, tensors, layout, out)
        except CheckpointError as error:
            raise CheckpointError(f"{self.model}: {layer.name}, expert {expert}: {error}") from error

    def _encode(
        self, codec: Codec, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor
    ) -> None:
        place = self.place
        start = time.perf_counter()
        try:
            codec.encode({name: tensor.to(place) for name, tensor in tensors.items()}, layout, out)
        except torch.OutOfMemoryError:
            if place == CPU:
                raise
            self._places = [CPU]
            codec.encode(tensors, layout, out)
            return
        if len(self._places) > 1 and self._trials:
            self._seconds_per_byte[self._trials.pop(0)] = (time.perf_counter() - start) / layout.nbytes


def _check_shapes(tensors: Mapping[str, torch.Tensor], layout: Layout) -> None:
    for tensor in layout.tensors:
        found = tensors.get(tensor.name)
        if found is None:
            raise CheckpointError(
                f"{tensor.name} is missing; the checkpoint is incomplete, download it again"
            )
        if tuple(found.shape) != tensor.shape or not found.is_floating_point():
            raise CheckpointError(
                f"{tensor.name} is {found.dtype} {tuple(found.shape)}, "
                f"the config says floating-point {tensor.shape}"
            )
