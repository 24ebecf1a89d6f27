"""NF4 experts of a layer in two grouped Triton kernels, read in place from their slots; and the weighted sum.

Imports Triton, so import this module only where it is there. `grouped.py` says which work comes here.

Letters: T tokens, K experts a token, D model width, F expert width. A *place* is token * K + rank. Vectors
that a matrix is multiplied with lie in *planes*: number c of a vector of C at [c % 8, c // 8] of [8, C / 8],
in float32. A thread takes the 32 weights of 16 bytes at a time; the eight weights of one word then meet eight
planes, and both are read in pieces of 16 bytes that neighbouring threads continue.

D and F are multiples of 64.

Table of a launch, int64 [G, 1 + TOKENS], a row an expert: its slot, then the places of its tokens, at least
one, then -1. Slot s starts `s * stride` bytes behind `base`, both multiples of 16.

The same bits. A program computes some rows for one expert and sees nothing of the others; what it does is
fixed by the shapes, so an answer does not depend on which experts share a launch, nor on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN, CONCATENATED, INTERLEAVED = (tl.constexpr(number) for number in range(3))
IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH, CLAMPED_SWIGLU, CLAMPED_SILU = (
    tl.constexpr(number) for number in range(8)
)
"""As in moe_native.h."""


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _activation(x, FUNCTION: tl.constexpr):
    """A function of one number; comparisons are such that NaN stays NaN."""
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
    COLS: tl.constexpr,
    Q: tl.constexpr,
    ABSMAX: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSET: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The rows of the matrix times the vectors of these numbers, both tuples of scalars: [rows, vectors].

    A matrix' row is COLS / 32 pieces of 16 bytes; PIECES of them are read in a step, by a thread each.
    Everything of size is [PIECES, 4] words or [PIECES]: of tensors with more dimensions Triton's releases
    think differently about which one runs along threads, and then exchange them through shared memory.
    """
    words = (expert + Q).to(tl.pointer_type(tl.int32))
    nested = (expert + NESTED).to(tl.pointer_type(tl.float32))
    offset = tl.load((expert + OFFSET).to(tl.pointer_type(tl.float32)))
    COUNT: tl.constexpr = len(rows) * len(numbers)
    lane = tl.arange(0, PIECES)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([PIECES], dtype=tl.float32),)
    for first in range(0, COLS // 32, PIECES):
        piece = first + lane
        there = piece < COLS // 32
        word = piece[:, None] * 4 + tl.arange(0, 4)[None, :]
        packed = ()
        parts = ()
        for r in tl.static_range(len(rows)):
            packed = packed + (tl.load(words + rows[r] * (COLS // 8) + word, mask=there[:, None], other=0),)
            for _ in tl.static_range(len(numbers)):
                parts = parts + (tl.zeros([PIECES, 4], dtype=tl.float32),)
        for i in tl.static_range(8):
            x = ()
            for t in tl.static_range(len(numbers)):
                plane = vectors + numbers[t] * COLS + i * (COLS // 8)
                x = x + (tl.load(plane + word, mask=there[:, None], other=0.0),)
            more = ()
            for r in tl.static_range(len(rows)):
                # The earlier weight of a byte is its high half.
                level = tl.load(levels + ((packed[r] >> ((4 * i) ^ 4)) & 15))
                for t in tl.static_range(len(numbers)):
                    more = more + (tl.fma(level, x[t], parts[r * len(numbers) + t]),)
            parts = more
        more = ()
        for r in tl.static_range(len(rows)):
            block = rows[r] * (COLS // 64) + piece // 2
            code = tl.load(expert + ABSMAX + block, mask=there, other=0).to(tl.int32)
            factor = tl.load(nested + block // 256, mask=there, other=0.0)
            scale = tl.fma(tl.load(scale_map + code), factor, offset)
            for t in tl.static_range(len(numbers)):
                part = tl.sum(parts[r * len(numbers) + t], axis=1)
                more = more + (tl.fma(part, scale, totals[r * len(numbers) + t]),)
        totals = more
    # All sums across threads at once, which costs one exchange instead of COUNT.
    stacked = tl.zeros([COUNT, PIECES], dtype=tl.float32)
    for n in tl.static_range(COUNT):
        stacked = tl.where((tl.arange(0, COUNT) == n)[:, None], totals[n][None, :], stacked)
    return tl.reshape(tl.sum(stacked, axis=1), [len(rows), len(numbers)])


@triton.jit
def _numbers(entry, PER: tl.constexpr, TOKENS: tl.constexpr):
    """The places in a row of the table, divided by PER; for none, again the first, which is always there."""
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
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    Q: tl.constexpr,
    ABSMAX: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ARRANGEMENT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """hidden[place] = gate function of the up matrix times x[token], for the experts of `table`.

    Grid (F / FEATURES, G). x float32 [T, 8, D / 8] and hidden float32 [T * K, 8, F / 8] in planes;
    WIDTH is F and COLS D.
    """
    entry = table + tl.program_id(1) * (1 + TOKENS)
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
        expert, rows, x, _numbers(entry, TOP_K, TOKENS), levels, scale_map,
        COLS, Q, ABSMAX, NESTED, OFFSET, PIECES,
    )  # fmt: skip
    features = first + tl.arange(0, FEATURES)
    bias = (expert + BIAS).to(tl.pointer_type(tl.float32))
    if ARRANGEMENT == PLAIN:
        if BIAS >= 0:
            y += tl.load(bias + features)[:, None]
        y = _activation(y, FUNCTION)
    else:
        gate, up = tl.split(tl.permute(tl.reshape(y, [FEATURES, 2, TOKENS]), [0, 2, 1]))
        if BIAS >= 0:
            own = features if ARRANGEMENT == CONCATENATED else 2 * features
            gate += tl.load(bias + own)[:, None]
            other = own + WIDTH if ARRANGEMENT == CONCATENATED else own + 1
            up += tl.load(bias + other)[:, None]
        y = _gated(gate, up, FUNCTION, ALPHA, LIMIT)
    places = tl.load(entry + 1 + tl.arange(0, TOKENS))[None, :]
    target = hidden + places * WIDTH + ((features % 8) * (WIDTH // 8) + features // 8)[:, None]
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
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    Q: tl.constexpr,
    ABSMAX: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """outputs[place] = the down matrix times hidden[place], for the experts of `table`.

    Grid (D / FEATURES, G). hidden float32 [T * K, 8, F / 8] in planes, outputs float32 [T * K, D];
    WIDTH is D and COLS F.
    """
    entry = table + tl.program_id(1) * (1 + TOKENS)
    expert = base + tl.load(entry) * stride
    first = tl.program_id(0) * FEATURES
    rows = ()
    for f in tl.static_range(FEATURES):
        rows = rows + (first + f,)
    y = _products(
        expert, rows, hidden, _numbers(entry, 1, TOKENS), levels, scale_map,
        COLS, Q, ABSMAX, NESTED, OFFSET, PIECES,
    )  # fmt: skip
    features = first + tl.arange(0, FEATURES)
    if BIAS >= 0:
        bias = (expert + BIAS).to(tl.pointer_type(tl.float32))
        y += tl.load(bias + features)[:, None]
    places = tl.load(entry + 1 + tl.arange(0, TOKENS))[None, :]
    tl.store(outputs + places * WIDTH + features[:, None], y, mask=places >= 0)


@triton.jit
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
