"""How the grouped kernels read each format's weights: what a word holds, and what its scales are.

Imports Triton; `grouped_formats.py` is the host's half of this interface. A matrix row is made of *pieces* of
16 bytes, four words of 32 bits, which one thread reads at once. Word w of a row holds PER_WORD weights, those
of columns w * PER_WORD + i. A new format needs

* a constant beside NF4, and branches in `packed` and `weight`, which return weights without their scales;
* if its scales are of a new kind, a constant beside NESTED and a branch in `scale`, and in `scaled`,
  `second_scale` and `finished` unless each piece has one scale and nothing else has;
* a class in `grouped_formats.py`, which has both constants, the layouts that it serves, and their offsets.

The format is a compile-time constant of a kernel, so the other branches cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

NF4, INT8, Q3, Q2, E2M1, E4M3 = (tl.constexpr(number) for number in range(6))
"""FORMAT: what a word holds."""

NESTED, FLOAT32, BFLOAT16, FLOAT16, EXPONENT8, FACTOR, DIVISOR = (tl.constexpr(number) for number in range(7))
"""SCALES: the kind of number that is stored per BLOCK_ROWS x BLOCK_COLS weights, or NF4's double-quantized
codes, or NVFP4's E4M3 per 16 columns, which a second scale per BLOCK_ROWS rows multiplies or divides."""


@triton.jit
def stepped(scales, block, there, levels):
    """The steps of Q3 or Q2 blocks, and -step * zero. `levels` has steps and zeros after the levels."""
    code = tl.load(scales + block, mask=there, other=0).to(tl.int32)
    step = tl.load(levels + 8 + (code & 15))
    return step, -step * tl.load(levels + 24 + (code >> 4))


@triton.jit
def packed(
    expert,
    row,
    word,
    there,
    levels,
    FORMAT: tl.constexpr,
    COLS: tl.constexpr,
    Q: tl.constexpr,
    SCALE_OF_SCALE: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Words `word`, [PIECES, 4], of a row, in a tuple with everything that `weight` needs to decode them.

    For Q3 and Q2 this includes each word's step, and what is to be added to level times step. A word of Q3 is
    half a block; each of a block's three words is in a plane of its own.
    """
    WORDS: tl.constexpr = COLS // PER_WORD
    words = (expert + Q).to(tl.pointer_type(tl.int32))
    if FORMAT == Q3:
        BLOCKS: tl.constexpr = WORDS // 2
        block = word >> 1
        half = word & 1
        words += row * (3 * BLOCKS) + block
        thirds = tl.load(words + 2 * BLOCKS, mask=there, other=0) >> (4 * half)
        found = (tl.load(words + half * BLOCKS, mask=there, other=0), thirds)
        found = found + stepped(expert + SCALE_OF_SCALE, row * BLOCKS + block, there, levels)
    else:
        found = (tl.load(words + row * WORDS + word, mask=there, other=0),)
        if FORMAT == Q2:
            found = found + stepped(expert + SCALE_OF_SCALE, row * WORDS + word, there, levels)
    return found


@triton.jit
def level(levels, code, SHUFFLES: tl.constexpr):
    """levels[code & 15], float32.

    With SHUFFLES every thread holds one of the levels and passes it to the other threads of its warp: three
    instructions per weight instead of six, since computing an address takes two, and only one load, since
    ptxas sees that it is always the same. All threads of a warp must get here together, so nothing around
    this call may branch by thread.
    """
    if SHUFFLES:
        value = tl.inline_asm_elementwise(
            """{
            .reg .u32 lane;
            .reg .u64 at;
            .reg .b32 own;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mul.wide.u32 at, lane, 4;
            add.u64 at, at, $1;
            ld.global.nc.b32 own, [at];
            shfl.sync.idx.b32 $0, own, $2, 0x100F, 0xffffffff;
            }""",
            "=f,l,r",
            [levels, code],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        value = tl.load(levels + (code & 15))
    return value


@triton.jit
def weight(packed, i, levels, FORMAT: tl.constexpr, SHUFFLES: tl.constexpr):
    """Weight i of each word, float32 [PIECES, 4], without its piece's scale. `levels`: a table of floats.

    `i` is a compile-time constant or a loop variable.
    """
    if FORMAT == NF4:
        # The earlier weight of a byte is its high half.
        value = level(levels, packed[0] >> ((4 * i) ^ 4), SHUFFLES)
    elif FORMAT == Q2:
        value = tl.fma(((packed[0] >> (2 * i)) & 3).to(tl.float32), packed[1], packed[2])
    elif FORMAT == Q3:
        third = packed[1] >> (8 * (i // 4) + i % 4)
        code = ((packed[0] >> (2 * i)) & 3) | ((third & 1) << 2)
        value = tl.fma(level(levels, code, SHUFFLES), packed[2], packed[3])
    elif FORMAT == E2M1:
        value = level(levels, packed[0] >> (4 * i), SHUFFLES)
    elif FORMAT == E4M3:
        value = e4m3(packed[0], i)  # for the missing factor `scale` compensates
    else:
        value = ((packed[0] << (24 - 8 * i)) >> 24).to(tl.float32)
    return value


@triton.jit
def e4m3(words, i):
    """The E4M3 numbers in bytes i of int32 words, divided by 256, as float32. The codes of NaN become 480.

    Triton has tl.float8e4nv only from compute capability 8.9 on. So this moves the sign, the four bits of the
    exponent and the three of the mantissa to where fp16 has them. Its exponent is biased by 15 instead of 7,
    so the same bits are numbers 256 times smaller; exactly, and subnormal ones stay subnormal.
    """
    byte = (words << (24 - 8 * i)) >> 24
    return ((byte << 7) & 0xBF80).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def offset_of(expert, SCALES: tl.constexpr, OFFSET: tl.constexpr):
    """The offset that is added to all scales of a matrix."""
    value = 0.0
    if SCALES == NESTED:
        value = tl.load((expert + OFFSET).to(tl.pointer_type(tl.float32)))
    return value


@triton.jit
def scale(
    expert,
    row,
    piece,
    there,
    offset,
    scale_map,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    COLS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OF_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """The scales of a row's pieces, for `scaled`: float32 [PIECES], since no block ends within a piece; of
    NVFP4 two such, since a piece has two blocks.

    `offset` comes from `offset_of`; `scale_map` has 256 floats.
    """
    if SCALES == FACTOR or SCALES == DIVISOR:
        both = (expert + SCALE).to(tl.pointer_type(tl.int16)) + row * (COLS // 32) + piece
        both = tl.load(both, mask=there, other=0).to(tl.int32)
        value = (e4m3(both, 0), e4m3(both, 1))
    else:
        PIECES_A_BLOCK: tl.constexpr = BLOCK_COLS // (4 * PER_WORD)
        block = (row // BLOCK_ROWS) * ((COLS + BLOCK_COLS - 1) // BLOCK_COLS) + piece // PIECES_A_BLOCK
        if SCALES == NESTED:
            nested = (expert + SCALE_OF_SCALE).to(tl.pointer_type(tl.float32))
            code = tl.load(expert + SCALE + block, mask=there, other=0).to(tl.int32)
            factor = tl.load(nested + block // 256, mask=there, other=0.0)
            value = tl.fma(tl.load(scale_map + code), factor, offset)
        else:
            value = number(expert + SCALE, block, there, SCALES)
        if FORMAT == E4M3:
            value = value * 256.0
    return value


@triton.jit
def scaled(parts, factor, total, SCALES: tl.constexpr):
    """total [PIECES] plus the sums of the pieces' words, [PIECES, 4], times their scales, from `scale`."""
    if SCALES == FACTOR or SCALES == DIVISOR:
        # Sums of two words each. LLVM leaves out additions of -0.0, which change nothing. Triton 3.6 reads it
        # as 0.0, which costs two additions per row and vector.
        later = (tl.arange(0, 4) >= 2)[None, :]
        total = tl.fma(tl.sum(tl.where(later, -0.0, parts), axis=1), factor[0], total)
        total = tl.fma(tl.sum(tl.where(later, parts, -0.0), axis=1), factor[1], total)
    else:
        total = tl.fma(tl.sum(parts, axis=1), factor, total)
    return total


@triton.jit
def second_scale(expert, row, SCALES: tl.constexpr, SCALE_OF_SCALE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """A row's second scale, for `finished`; of formats without any, 1."""
    value = 1.0
    if SCALES == FACTOR or SCALES == DIVISOR:
        value = tl.load((expert + SCALE_OF_SCALE).to(tl.pointer_type(tl.float32)) + row // BLOCK_ROWS)
    return value


@triton.jit
def finished(total, second, SCALES: tl.constexpr):
    """The sums of a row's pieces, [PIECES], with its second scale and the factor that `e4m3` leaves out.

    Not part of `second_scale`, since what waits for that load belongs behind the loop over pieces.
    """
    if SCALES == FACTOR:
        total = total * (256.0 * second)
    elif SCALES == DIVISOR:
        total = total * (256.0 / second)
    return total


@triton.jit
def number(start, index, there, KIND: tl.constexpr):
    """Numbers `index` of an array of a KIND that starts at `start`, as float32."""
    if KIND == FLOAT32:
        value = tl.load(start.to(tl.pointer_type(tl.float32)) + index, mask=there, other=0.0)
    elif KIND == BFLOAT16:
        half = tl.load(start.to(tl.pointer_type(tl.int16)) + index, mask=there, other=0)
        value = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == EXPONENT8:
        byte = tl.load(start + index, mask=there, other=0).to(tl.int32)
        value = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
    else:
        value = tl.load(start.to(tl.pointer_type(tl.float16)) + index, mask=there, other=0.0).to(tl.float32)
    return value
