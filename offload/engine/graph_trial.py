"""Finds out by trial, when a model is loaded, whether it can decode from CUDA graphs.

The decision never depends on a model's name. A forward of one token is captured, replayed for other tokens
and compared with the plain forward. A model whose forward waits for the device, or which does not work with a
cache and a mask at fixed addresses, keeps the plain forward.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from moe_local.cache.errors import OptionError, first_line
from moe_local.offload.dense.attention import NAME as SINGLE_QUERY
from moe_local.offload.dense.latent_attention import NAME as LATENT
from moe_local.offload.dense.sink_attention import NAME as WITH_SINKS
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.graphs import Graphs
from moe_local.offload.engine.kv_slab import KVSlab
from moe_local.offload.engine.recording import Saw
from moe_local.offload.engine.token_step import TokenStep
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.gpu.relief import shortage
from moe_local.offload.modeling.masks import use_capturable_mask
from moe_local.offload.prefetch.routers import RouterSite

VARIABLE = "MOE_LOCAL_GRAPHS"
MODES = ("auto", "on", "off")
HISTORY, TOKENS, ROUNDS = 5, 6, 8
"""Tokens in the cache before a trial, tokens that it compares, and how often it times one. Of the compared
tokens the first is computed, the second is captured, and the others are replayed."""

EXACT, ROUGH = 1e-4, 0.1
"""Allowed error of logits, relative to their norm, in fp32 and in 16-bit dtypes, as the median over tokens:
attention over a masked row sums in another order, which may change a router's choice once. A stale address
gives errors as large as the norm."""

logger = logging.getLogger(__name__)


def graph_mode() -> str:
    """What MOE_LOCAL_GRAPHS says; see `mode_of`."""
    return mode_of(VARIABLE)


def mode_of(variable: str) -> str:
    """The variable's value: "auto", "on" (even where that is slower) or "off". Raises OptionError."""
    mode = os.environ.get(variable) or "auto"
    if mode not in MODES:
        raise OptionError(f"{variable} is {mode!r}; it may be {', '.join(MODES)}")
    return mode


def use_graphs(
    engine: Engine,
    graphs: Graphs,
    *,
    sites: Sequence[RouterSite | None] = (),
    saw: Saw | None = None,
    mode: str = "auto",
    stand_in: bool = True,
) -> None:
    """Let `engine` compute single tokens at fixed addresses where this works, from graphs if that is faster.

    `sites` and `saw` as for a Recording. A stub replaces the experts during the trial, so that nothing is
    fetched or counted. Without `stand_in` replays with the experts themselves are tried as well, against the
    same forward computed, but not against the plain one: in 16 bits, rounding changes routers' choices layer
    after layer, which is too near to what something wrong would do. If graphs are not used, the reason is
    logged once.

    Whether tokens are computed at fixed addresses depends on the model alone, never on timing, since it
    affects their bits. Timing decides only whether tokens are replayed or computed; with mode "on", not even
    that.
    """
    if mode == "off":
        return
    reason, slower = _hindrance(engine), False
    if reason is None:
        use_capturable_mask(engine.hf)
        step = engine.make_token_step(graphs, sites, saw)
        with _stood_in(engine):
            reason, slower = with_room(engine, lambda: _try(engine, step, mode if stand_in else "on"))
        if reason is None and not stand_in:
            step = engine.make_token_step(graphs, sites, saw)
            reason, slower = with_room(engine, lambda: _try(engine, step, mode, beside_plain=False))
    if reason is not None:
        logger.info("decoding goes without CUDA graphs: %s", reason)
        return
    engine.token_step = step
    if slower:
        step.stop_capturing()
        logger.info("decoding goes without CUDA graphs: with them it was slower")


def _hindrance(engine: Engine) -> str | None:
    """Why a model is not even tried; None: try it."""
    hf, kv = engine.hf, engine.kv
    if not isinstance(kv, KVSlab):
        return "its cache is not kept at fixed addresses"
    if kv.has_indexer:
        return "its attention chooses its tokens"
    attention = hf.config.get_text_config(decoder=True)._attn_implementation
    if attention not in ("sdpa", "eager", SINGLE_QUERY, WITH_SINKS, LATENT):
        return f"its attention, {attention}, takes no mask"
    if any(type(module).__name__ == "Linear8bitLt" for module in hf.modules()):
        return "its int8 layers wait for the device"
    if kv.lens or kv.capacity <= HISTORY + TOKENS:
        return "there is no room to try"
    return None


def _try(engine: Engine, step: TokenStep, mode: str, *, beside_plain: bool = True) -> tuple[str | None, bool]:
    """(why `step` does not work for the model, or None; whether it is slower)."""
    reason = _difference(engine, step, beside_plain=beside_plain)
    return reason, reason is None and mode == "auto" and _is_slower(engine, step)


def with_room(engine: Engine, trial: Callable[[], tuple[str | None, bool]]) -> tuple[str | None, bool]:
    """The result of a trial; the error that it raised takes the place of the reason.

    If the device's memory runs out, experts are evicted, as in any other step, and the trial starts again:
    its outcome must not depend on how much memory was free at that moment.
    """
    while True:
        try:
            return trial()
        except Exception as error:  # a model may fail in any way with an unknown cache
            reason, lacking = f"{type(error).__name__}: {first_line(error)}", shortage(error)
        if lacking is None or engine.relief is None or not engine.relief(lacking):
            return reason, False


class _StandIn:
    """A stub for experts in a trial: its output depends on all its inputs, and it waits for the device."""

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ids = index.flatten().tolist()
        factor = weights.sum() * (1 + 0.1 * sum(ids) / (len(ids) * experts.num_experts))
        output: torch.Tensor = hidden * factor.to(hidden.dtype)
        return output


@contextmanager
def _stood_in(engine: Engine) -> Iterator[None]:
    modules = [module for module in engine.hf.modules() if isinstance(module, OffloadedExperts)]
    before = [module.runner for module in modules]
    for module in modules:
        module.attach(_StandIn())
    try:
        yield
    finally:
        for module, runner in zip(modules, before, strict=True):
            module.attach(runner)


@contextmanager
def row_to_try(engine: Engine) -> Iterator[int]:
    """A row of the key-value memory with HISTORY tokens in it, freed afterwards."""
    kv = engine.kv
    row = kv.join()
    try:
        with torch.inference_mode():
            for number in range(HISTORY):
                engine.plain_logits(row, [token_to_try(engine, number)])
                kv.advance(row, 1)
            yield row
    finally:
        kv.abort(row)
        kv.leave(row)


def token_to_try(engine: Engine, number: int) -> int:
    """The id of the trial's token `number`."""
    return (7919 * (number + 1)) % engine.vocab_size


def _difference(engine: Engine, step: TokenStep, *, beside_plain: bool) -> str | None:
    """What is wrong with `step`, or None: replayed logits must be those that are computed, and with
    `beside_plain` those of the plain forward, up to rounding. The former are mostly equal bit by bit, but a
    library of the device's may choose another kernel under capture."""
    off, kv = [], engine.kv
    allowed = allowed_error(engine.hf.dtype)
    assert isinstance(kv, KVSlab)
    with row_to_try(engine) as row:
        _go_beyond_windows(engine, row)
        # Each way continues from its own states: with shared ones, a graph that writes no state would pass.
        replayed = plain = kv.mark(row)
        for number in range(HISTORY, HISTORY + TOKENS):
            token, before = token_to_try(engine, number), replayed
            before()
            got = step.logits(row, token).clone()  # first, since the others write the token's column, too
            if step.failure is not None:
                return step.failure
            replayed = kv.mark(row)
            before()
            error = error_of(got, step.computed(row, token))
            if not error <= allowed:
                return f"replayed logits were off by {error:.2g} of their norm, where {allowed} is allowed"
            if beside_plain:
                plain()
                off.append(error_of(got, engine.plain_logits(row, [token])))
                plain = kv.mark(row)
            kv.advance(row, 1)
    if not off:
        return None
    typical = statistics.median(off)
    if not typical <= allowed:
        return f"logits were off by {typical:.2g} of their norm, where {allowed} is allowed"
    return None


def allowed_error(dtype: torch.dtype) -> float:
    """Of the logits of a model of this dtype."""
    return EXACT if dtype == torch.float32 else ROUGH


def error_of(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the norm of those that are wanted."""
    return float((logits - wanted).norm() / wanted.norm())


def _go_beyond_windows(engine: Engine, row: int) -> None:
    """Move the row beyond the largest sliding window, if the context allows, so that windows hide columns.

    The tokens that are skipped are columns of zeros, which attention treats like any others.
    """
    kv = engine.kv
    assert isinstance(kv, KVSlab)
    window = max((store.window or 0 for store in kv.layers if store is not None), default=0)
    if HISTORY + window + TOKENS <= kv.capacity:
        kv.clear(row)
        kv.advance(row, window)


def _is_slower(engine: Engine, step: TokenStep) -> bool:
    """Whether replaying the same token repeatedly takes longer, in the median, than the plain forward."""
    with row_to_try(engine) as row:
        token = token_to_try(engine, HISTORY)
        replayed, plain = [], []
        for _ in range(ROUNDS):
            replayed.append(seconds(lambda: step.logits(row, token)))
            plain.append(seconds(lambda: engine.plain_logits(row, [token])))
    return statistics.median(replayed) > statistics.median(plain)


def seconds(compute: Callable[[], torch.Tensor]) -> float:
    """Seconds until the device has computed these logits."""
    start = time.perf_counter()
    float(compute()[0, 0])  # waits for the device
    return time.perf_counter() - start
