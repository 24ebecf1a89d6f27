"""Decoders of the block formats of GGUF files (ggml-common.h in github.com/ggml-org/ggml).

A block holds 32, 64 or 256 numbers of a row. All scales are float16, in some formats times small integers,
except MXFP4's, which are powers of two, and NVFP4's, which are E4M3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_local.offload.quantize import gguf_iq, mxfp4
from moe_local.offload.quantize.fp8 import exponents
from moe_local.offload.quantize.gguf_bits import fields, half, nibbles, pairs
from moe_local.offload.system.direct_io import page_memory

SUPER = 256
"""Numbers in a block of the K, TQ and IQ formats, except IQ4_NL."""

CHUNK = 1 << 18
"""How many numbers are decoded at a time, so that what is made on the way fits the cache, or nearly."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers that the codes of IQ4_NL and IQ4_XS stand for."""


class BlockFormat(NamedTuple):
    """Blocks of `numbers` numbers in `nbytes` bytes; `decode` converts uint8 [B, nbytes] to float32 [B,
    numbers]."""

    numbers: int
    nbytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


def dequantize_gguf(raw: torch.Tensor, format: str) -> torch.Tensor:
    """Rows of blocks on the CPU, uint8 [..., bytes of a row] -> new float32 [..., numbers of a row].

    Besides, it uses memory for a few times `CHUNK` numbers.
    """
    numbers, nbytes, decode = FORMATS[format]
    blocks = raw.reshape(-1, nbytes)
    # In huge pages, since the faults on small ones take as long as the decoding.
    decoded = page_memory(4 * numbers * len(blocks)).view(torch.float32).view(-1, numbers)
    step = CHUNK // numbers
    for start in range(0, len(blocks), step):
        decoded[start : start + step] = decode(blocks[start : start + step])
    return decoded.view(*raw.shape[:-1], raw.shape[-1] // nbytes * numbers)


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    return nibbles(raw[:, 2:]).flatten(1).float().sub_(8).mul_(half(raw[:, :2]))


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    return nibbles(raw[:, 4:]).flatten(1).float().mul_(half(raw[:, :2])).add_(half(raw[:, 2:4]))


def _q5_0(raw: torch.Tensor) -> torch.Tensor:
    q = nibbles(raw[:, 6:]).flatten(1) | fields(raw[:, 2:6], 1, 8) << 4
    return q.float().sub_(16).mul_(half(raw[:, :2]))


def _q5_1(raw: torch.Tensor) -> torch.Tensor:
    q = nibbles(raw[:, 8:]).flatten(1) | fields(raw[:, 4:8], 1, 8) << 4
    return q.float().mul_(half(raw[:, :2])).add_(half(raw[:, 2:4]))


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float().mul_(half(raw[:, :2]))


def _q2_k(raw: torch.Tensor) -> torch.Tensor:
    """Sixteen parts of 16 numbers, each with a byte: scale in its lower half, minimum in its upper."""
    factors = raw[:, :16]
    scale = (half(raw[:, 80:82]) * (factors & 15)).unsqueeze(-1)
    least = (half(raw[:, 82:84]) * (factors >> 4)).unsqueeze(-1)
    q = pairs(raw[:, 16:80].unflatten(1, (2, 32))).reshape(-1, 16, 16)
    return (q.float() * scale - least).flatten(1)


def _q3_k(raw: torch.Tensor) -> torch.Tensor:
    """Sixteen parts of 16 numbers with scales of six bits, less 32. Bit n of byte i is the third bit of
    number 32 n + i, inverted."""
    low, high = nibbles(raw[:, 96:104]).flatten(1), pairs(raw[:, 104:108]).flatten(1)
    scale = ((low | high << 4).float() - 32) * half(raw[:, 108:110])
    third = fields(raw[:, :32], 1, 8).unflatten(1, (32, 8)).transpose(1, 2).reshape(-1, 16, 16)
    q: torch.Tensor = pairs(raw[:, 32:96].unflatten(1, (2, 32))).reshape(-1, 16, 16) | third << 2
    return ((q.float() - 4) * scale.unsqueeze(-1)).flatten(1)


def _q4_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    q = nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return (q.float() * scale - least).flatten(1)


def _q5_k(raw: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_minima(raw)
    fifth = fields(raw[:, 16:48], 1, 8).unflatten(1, (32, 8)).transpose(1, 2)
    q: torch.Tensor = nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth << 4
    return (q.float() * scale - least).flatten(1)


def _q6_k(raw: torch.Tensor) -> torch.Tensor:
    low = nibbles(raw[:, :128].unflatten(1, (2, 64))).view(-1, 8, 32)
    high = pairs(raw[:, 128:192].unflatten(1, (2, 32))).view(-1, 8, 32)
    scale = raw[:, 192:208].contiguous().view(torch.int8).float() * half(raw[:, 208:])
    q = (low | high << 4).float().sub_(32).view(-1, 16, 16)
    decoded: torch.Tensor = (q * scale[..., None]).flatten(1)
    return decoded


def _scales_and_minima(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minima of a block's eight parts, float32 [B, 8, 1] each.

    They are two float16 numbers times 6-bit integers, packed into twelve bytes, four each of a, b and c. a
    has the first four scales and, above them, the upper two bits of the last four; b has the same of the
    minima; c has the lower four bits of the last scales and minima.
    """
    a, b, c = raw[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scale = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], dim=1)
    least = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], dim=1)
    return (half(raw[:, :2]) * scale).unsqueeze(-1), (half(raw[:, 2:4]) * least).unsqueeze(-1)


def _iq4_nl(raw: torch.Tensor) -> torch.Tensor:
    return _iq4(nibbles(raw[:, 2:]).flatten(1)).mul_(half(raw[:, :2]))


def _iq4_xs(raw: torch.Tensor) -> torch.Tensor:
    """Eight parts of 32 numbers; the scales' upper two bits are apart, four to a byte."""
    low, high = fields(raw[:, 4:8], 4, 2), fields(raw[:, 2:4], 2, 4)
    scale = ((low | high << 4).float() - 32) * half(raw[:, :2])
    q = _iq4(nibbles(raw[:, 8:].unflatten(1, (8, 16))).flatten(2))
    decoded: torch.Tensor = q.mul_(scale.unsqueeze(-1)).flatten(1)
    return decoded


def _iq4(codes: torch.Tensor) -> torch.Tensor:
    return _looked_up(torch.tensor(IQ4, dtype=torch.float32, device=codes.device), codes)


def _looked_up(numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """numbers[codes], twice as fast."""
    return numbers.index_select(0, codes.flatten().int()).view(codes.shape)


def _mxfp4(raw: torch.Tensor) -> torch.Tensor:
    """gpt-oss' numbers, with those of a block's first half in the lower halves of its bytes."""
    codes = nibbles(raw[:, 1:]).flatten(1)
    return _looked_up(mxfp4.numbers(raw.device), codes).mul_(exponents(raw[:, :1]))


def _nvfp4(raw: torch.Tensor) -> torch.Tensor:
    """Four parts of 16 numbers with scales in E4M3, without sign; NaN is read as zero."""
    scale = (raw[:, :4] & 127).view(torch.float8_e4m3fn).float().nan_to_num_(0.0)
    codes = nibbles(raw[:, 4:].unflatten(1, (4, 8))).flatten(2)
    return _looked_up(mxfp4.numbers(raw.device), codes).mul_(scale.unsqueeze(-1)).flatten(1)


def _tq1_0(raw: torch.Tensor) -> torch.Tensor:
    """The digits -1, 0 and 1: five in each of 32, then of 16 bytes, four in each of the last four."""
    digits = [_digits(raw[:, :32], 5), _digits(raw[:, 32:48], 5), _digits(raw[:, 48:52], 4)]
    return torch.cat(digits, dim=1).float().sub_(1).mul_(half(raw[:, 52:]))


def _digits(raw: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [B, n] -> [B, count * n]: the first ternary digits behind the point of all bytes / 256, then the
    second, and so on."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=raw.device)[:count, None]
    shifted = raw.unsqueeze(1) * powers  # modulo 256, which drops the digits before
    return ((shifted.short() * 3) >> 8).flatten(1)


def _tq2_0(raw: torch.Tensor) -> torch.Tensor:
    q = pairs(raw[:, :64].unflatten(1, (2, 32))).flatten(1)
    return q.float().sub_(1).mul_(half(raw[:, 64:]))


FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(SUPER, 84, _q2_k),
    "Q3_K": BlockFormat(SUPER, 110, _q3_k),
    "Q4_K": BlockFormat(SUPER, 144, _q4_k),
    "Q5_K": BlockFormat(SUPER, 176, _q5_k),
    "Q6_K": BlockFormat(SUPER, 210, _q6_k),
    "IQ1_S": BlockFormat(SUPER, 50, gguf_iq.iq1_s),
    "IQ1_M": BlockFormat(SUPER, 56, gguf_iq.iq1_m),
    "IQ2_XXS": BlockFormat(SUPER, 66, gguf_iq.iq2_xxs),
    "IQ2_XS": BlockFormat(SUPER, 74, gguf_iq.iq2_xs),
    "IQ2_S": BlockFormat(SUPER, 82, gguf_iq.iq2_s),
    "IQ3_XXS": BlockFormat(SUPER, 98, gguf_iq.iq3_xxs),
    "IQ3_S": BlockFormat(SUPER, 110, gguf_iq.iq3_s),
    "IQ4_NL": BlockFormat(32, 18, _iq4_nl),
    "IQ4_XS": BlockFormat(SUPER, 136, _iq4_xs),
    "TQ1_0": BlockFormat(SUPER, 54, _tq1_0),
    "TQ2_0": BlockFormat(SUPER, 66, _tq2_0),
    "MXFP4": BlockFormat(32, 17, _mxfp4),
    "NVFP4": BlockFormat(64, 36, _nvfp4),
}
