"""The interface of a format of expert weights, and the list of all formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

from moe_local.cache.errors import OptionError
from moe_local.offload.quantize.layout import Layout, TensorSpec

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """Converts the weights of one expert to one flat buffer and back. Stateless; one instance per format."""

    name: str
    """The name in `experts=`: "nf4", "bf16" ..."""

    exact: bool
    """Whether weights that the storage dtype can represent are decoded bit-equal."""

    def layout(self, tensors: Sequence[TensorSpec]) -> Layout:
        """Where each part of an expert with these tensors is in the buffer."""

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout, out: torch.Tensor) -> None:
        """Write the expert into `out`, uint8 [layout.nbytes] on the CPU, padding zeroed.

        `tensors` has the shapes of `layout.tensors` in any floating dtype, on any device.
        """

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The expert's tensors in `dtype`, on the buffer's device.

        `buffer` is uint8 [>= layout.nbytes]. Exact formats of the same dtype return views of it, which are
        valid as long as the slot is leased; others return new tensors.
        """


@cache
def codecs() -> dict[str, Codec]:
    """Every format by name, best known first."""
    from moe_local.offload.quantize.exact import ExactCodec
    from moe_local.offload.quantize.fp8 import FP8Codec
    from moe_local.offload.quantize.int8 import Int8Codec
    from moe_local.offload.quantize.low import LowCodec
    from moe_local.offload.quantize.low_blocks import Q2, Q3
    from moe_local.offload.quantize.mxfp4 import MXFP4Codec
    from moe_local.offload.quantize.nf4 import NF4Codec

    exact = [ExactCodec(name) for name in ("bf16", "fp16", "fp32")]
    low = [LowCodec(Q3), LowCodec(Q2)]
    found: list[Codec] = [NF4Codec(), Int8Codec(), *low, MXFP4Codec(), FP8Codec(), *exact]
    return {codec.name: codec for codec in found}


NATIVE = "native"
"""The name by which users ask for the checkpoint's own format. Layouts have the name of the actual format."""


class Decoder(Protocol):
    """The decoding half of a Codec."""

    def decode(self, buffer: torch.Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As Codec's."""


def expert_formats() -> list[str]:
    """The formats that users may ask for."""
    return [*codecs(), NATIVE]


def decoder_for(format: str) -> Decoder:
    """The decoder of layouts of this format: a codec, or the decoder of publishers' own formats."""
    from moe_local.offload.quantize.stored import FORMATS, StoredDecoder

    return StoredDecoder() if format in FORMATS else codec_for(format)


def codec_for(name: str) -> Codec:
    """The codec called `name`. Raises OptionError, which lists the known ones, if there is none."""
    known = codecs()
    if name not in known:
        raise OptionError(f"unknown expert format {name!r}; use one of {', '.join(known)}")
    return known[name]
