"""Triton kernels for a layer's experts: two grouped ones that read weights in place from slots, and the sum.

Imports Triton, so import this module only if it is installed. `grouped.py` decides which work comes here, and
`triton_formats.py` has the code that reads each format.

Letters: T tokens, K experts per token, D model width, F expert width. A *place* is token * K + rank. A word
of 32 bits holds P weights. Vectors that a matrix is multiplied with are stored in P *planes*: number c of a
vector of C is at [c % P, c // P] of [P, C / P], in float32. A thread reads 16 bytes of weights, a *piece*, at
a time. Weight i of each word is multiplied with plane i, so weights and vectors are both read in coalesced
loads of 16 bytes per thread.

D and F are multiples of the number of weights in a piece.

A launch has a table, int64 [G, 1 + TOKENS], with one row per expert: its slot, then the places of its tokens,
padded with -1. Rows without places are skipped. Slot s starts `s * stride` bytes after `base`; both are
multiples of 16.

Results are reproducible bit for bit. A program computes some rows of one expert, independently of the others,
and the order of its operations is fixed by the shapes. So an answer does not depend on which experts share a
launch, nor on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_local.offload.kernels.triton_formats import (
    finished,
    number,
    offset_of,
    packed,
    scale,
    scaled,
    second_scale,
    weight,
)

PLAIN, CONCATENATED, INTERLEAVED = (tl.constexpr(number) for number in range(3))
IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH, CLAMPED_SWIGLU, CLAMPED_SILU = (
    tl.constexpr(number) for number in range(8)
)
"""The numbers are those of Arrangement and Function in moe_native.h."""


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _activation(x, FUNCTION: tl.constexpr):
    """An activation function without gate; the comparisons keep NaN."""
    if FUNCTION == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif FUNCTION == RELU2:
        x = tl.where(x < 0.0, 0.0, x)
        x = x * x
    elif FUNCTION == SILU:
        x = _silu(x)
    elif FUNCTION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == GELU_TANH:
        # x * (1 + tanh(u)) / 2 is x * sigmoid(2 u)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return x


@triton.jit
def _gated(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if FUNCTION == CLAMPED_SWIGLU or FUNCTION == CLAMPED_SILU:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        if FUNCTION == CLAMPED_SWIGLU:
            result = (up + 1.0) * (gate / (1.0 + tl.exp(-ALPHA * gate)))
        else:
            result = up * _silu(gate)
    else:
        result = _activation(gate, FUNCTION) * up
    return result


@triton.jit
def _products(
    expert,
    rows,
    vectors,
    numbers,
    levels,
    scale_map,
    planes,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    PER_WORD: tl.constexpr,
    Q: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OF_SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    PLANES: tl.constexpr,
    SHUFFLES: tl.constexpr,
):
    """Rows `rows` of the matrix times vectors `numbers`, both tuples of scalar indices -> [rows, vectors].

    A step reads PIECES pieces of each row, one per thread, and multiplies them with PLANES planes at a time.
    All large tensors are [PIECES, 4] words or [PIECES]: with more dimensions, Triton's releases differ in
    which dimension they distribute over threads, and then exchange data through shared memory.
    """
    COUNT: tl.constexpr = len(rows) * len(numbers)
    WORDS: tl.constexpr = COLS // PER_WORD
    offset = offset_of(expert, SCALES, OFFSET)
    seconds = ()
    for r in tl.static_range(len(rows)):
        seconds = seconds + (second_scale(expert, rows[r], SCALES, SCALE_OF_SCALE, BLOCK_ROWS),)
    lane = tl.arange(0, PIECES)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([PIECES], dtype=tl.float32),)
    for first in range(0, WORDS // 4, PIECES):
        piece = first + lane
        there = piece < WORDS // 4
        word = piece[:, None] * 4 + tl.arange(0, 4)[None, :]
        read = ()
        parts = ()
        for r in tl.static_range(len(rows)):
            read = read + (
                packed(
                    expert, rows[r], word, there[:, None], levels,
                    FORMAT, COLS, Q, SCALE_OF_SCALE, PER_WORD,
                ),
            )  # fmt: skip
            for _ in tl.static_range(len(numbers)):
                parts = parts + (tl.zeros([PIECES, 4], dtype=tl.float32),)
        # `planes` equals PER_WORD at run time. ptxas must not know this, or it would unroll the loop again.
        for plane in range(0, PER_WORD if PLANES == PER_WORD else planes, PLANES):
            for i in tl.static_range(PLANES):
                x = ()
                for t in tl.static_range(len(numbers)):
                    start = vectors + numbers[t] * COLS + (plane + i) * WORDS
                    x = x + (tl.load(start + word, mask=there[:, None], other=0.0),)
                more = ()
                for r in tl.static_range(len(rows)):
                    value = weight(read[r], plane + i, levels, FORMAT, SHUFFLES)
                    for t in tl.static_range(len(numbers)):
                        more = more + (tl.fma(value, x[t], parts[r * len(numbers) + t]),)
                parts = more
        more = ()
        for r in tl.static_range(len(rows)):
            factor = scale(
                expert, rows[r], piece, there, offset, scale_map,
                FORMAT, SCALES, COLS, SCALE, SCALE_OF_SCALE, BLOCK_ROWS, BLOCK_COLS, PER_WORD,
            )  # fmt: skip
            for t in tl.static_range(len(numbers)):
                part, total = parts[r * len(numbers) + t], totals[r * len(numbers) + t]
                more = more + (scaled(part, factor, total, SCALES),)
        totals = more
    # Reduce all sums across threads at once, in one exchange instead of COUNT.
    stacked = tl.zeros([COUNT, PIECES], dtype=tl.float32)
    for n in tl.static_range(COUNT):
        total = finished(totals[n], seconds[n // len(numbers)], SCALES)
        stacked = tl.where((tl.arange(0, COUNT) == n)[:, None], total[None, :], stacked)
    return tl.reshape(tl.sum(stacked, axis=1), [len(rows), len(numbers)])


@triton.jit
def _numbers(entry, PER: tl.constexpr, TOKENS: tl.constexpr):
    """The places in a row of the table, divided by PER; -1 is replaced by the first place, which always
    exists."""
    first = tl.load(entry + 1)
    numbers = (first // PER,)
    for t in tl.static_range(1, TOKENS):
        place = tl.load(entry + 1 + t)
        numbers = numbers + (tl.where(place < 0, first, place) // PER,)
    return numbers


@triton.jit
def up_kernel(
    base,
    stride,
    table,
    x,
    hidden,
    levels,
    scale_map,
    planes,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    PER_WORD: tl.constexpr,
    Q: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OF_SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_KIND: tl.constexpr,
    ARRANGEMENT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PIECES: tl.constexpr,
    PLANES: tl.constexpr,
    SHUFFLES: tl.constexpr,
):
    """hidden[place] = gate(up matrix times x[token]), for the experts of `table`.

    Grid (F / FEATURES, G). x float32 [T, P, D / P] and hidden float32 [T * K, P, F / P] in planes;
    WIDTH is F and COLS D. `planes`: P.
    """
    entry = table + tl.program_id(1) * (1 + TOKENS)
    if tl.load(entry + 1) < 0:  # no places: computed by another launch
        return
    expert = base + tl.load(entry) * stride
    first = tl.program_id(0) * FEATURES
    rows = ()
    for f in tl.static_range(FEATURES):
        feature = first + f
        if ARRANGEMENT == PLAIN:
            rows = rows + (feature,)
        elif ARRANGEMENT == CONCATENATED:
            rows = rows + (feature, feature + WIDTH)
        else:
            rows = rows + (2 * feature, 2 * feature + 1)
    y = _products(
        expert, rows, x, _numbers(entry, TOP_K, TOKENS), levels, scale_map, planes,
        COLS, FORMAT, SCALES, PER_WORD, Q, SCALE, SCALE_OF_SCALE, OFFSET, BLOCK_ROWS, BLOCK_COLS,
        PIECES, PLANES, SHUFFLES,
    )  # fmt: skip
    features = first + tl.arange(0, FEATURES)
    if ARRANGEMENT == PLAIN:
        if BIAS >= 0:
            y += number(expert + BIAS, features, True, BIAS_KIND)[:, None]
        y = _activation(y, FUNCTION)
    else:
        gate, up = tl.split(tl.permute(tl.reshape(y, [FEATURES, 2, TOKENS]), [0, 2, 1]))
        if BIAS >= 0:
            own = features if ARRANGEMENT == CONCATENATED else 2 * features
            gate += number(expert + BIAS, own, True, BIAS_KIND)[:, None]
            other = own + WIDTH if ARRANGEMENT == CONCATENATED else own + 1
            up += number(expert + BIAS, other, True, BIAS_KIND)[:, None]
        y = _gated(gate, up, FUNCTION, ALPHA, LIMIT)
    places = tl.load(entry + 1 + tl.arange(0, TOKENS))[None, :]
    target = (
        hidden
        + places * WIDTH
        + ((features % PER_WORD) * (WIDTH // PER_WORD) + features // PER_WORD)[:, None]
    )
    tl.store(target, y, mask=places >= 0)


@triton.jit
def down_kernel(
    base,
    stride,
    table,
    hidden,
    outputs,
    levels,
    scale_map,
    planes,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    PER_WORD: tl.constexpr,
    Q: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OF_SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PIECES: tl.constexpr,
    PLANES: tl.constexpr,
    SHUFFLES: tl.constexpr,
):
    """outputs[place] = the down matrix times hidden[place], for the experts of `table`.

    Grid (D / FEATURES, G). hidden float32 [T * K, P, F / P] in planes, outputs float32 [T * K, D];
    WIDTH is D and COLS F. `planes`: P.
    """
    entry = table + tl.program_id(1) * (1 + TOKENS)
    if tl.load(entry + 1) < 0:  # no places: computed by another launch
        return
    expert = base + tl.load(entry) * stride
    first = tl.program_id(0) * FEATURES
    rows = ()
    for f in tl.static_range(FEATURES):
        rows = rows + (first + f,)
    y = _products(
        expert, rows, hidden, _numbers(entry, 1, TOKENS), levels, scale_map, planes,
        COLS, FORMAT, SCALES, PER_WORD, Q, SCALE, SCALE_OF_SCALE, OFFSET, BLOCK_ROWS, BLOCK_COLS,
        PIECES, PLANES, SHUFFLES,
    )  # fmt: skip
    features = first + tl.arange(0, FEATURES)
    if BIAS >= 0:
        y += number(expert + BIAS, features, True, BIAS_KIND)[:, None]
    places = tl.load(entry + 1 + tl.arange(0, TOKENS))[None, :]
    tl.store(outputs + places * WIDTH + features[:, None], y, mask=places >= 0)


# A step's weights may start at any address and are read one by one, so do not compile for each alignment.
@triton.jit(do_not_specialize_on_alignment=["weights"])
def combine_kernel(
    outputs, weights, combined, TOP_K: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """combined[token] = sum over rank, in order, of weights[token, rank] * outputs[token * K + rank].

    Grid (ceil(D / COLUMNS), T). outputs float32 [T * K, D], weights [T, K] and combined [T, D] of any float
    dtype, summed in float32; WIDTH is D.
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for rank in range(TOP_K):
        weight = tl.load(weights + token * TOP_K + rank).to(tl.float32)
        total += weight * tl.load(outputs + (token * TOP_K + rank) * WIDTH + column, mask=inside, other=0.0)
    tl.store(combined + token * WIDTH + column, total.to(combined.dtype.element_ty), mask=inside)
