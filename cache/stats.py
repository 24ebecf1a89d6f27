"""Counters of what happened: those that a cache keeps, and the frozen record of them that users get."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

STARVED_SHARE = 0.01
"""An expert chosen by a smaller share of its layer's tokens than this is starved."""
STARVED_MIN_TOKENS = 1000
"""A layer that routed fewer tokens than this is not judged."""


class _Counts:
    """Base of dataclasses of counts: `later - earlier` are those between two moments; periods add up."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        return self._with(other, operator.add)

    def __sub__(self, earlier: Self) -> Self:
        return self._with(earlier, operator.sub)

    def _with(self, other: Self, combine: Callable[[Any, Any], Any]) -> Self:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return type(self)(
            **{name: _each(getattr(self, name), getattr(other, name), combine) for name in names}
        )


def _each(first: Any, second: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Two numbers combined, or two tuples of the same shape, number by number."""
    if not isinstance(first, tuple):
        return combine(first, second)
    if len(first) != len(second):
        raise ValueError(f"statistics of {len(first)} and {len(second)} layers or experts cannot be combined")
    return tuple(_each(a, b, combine) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True, slots=True)
class PrefetchStats(_Counts):
    """What prefetching did, counted in experts except for the bytes, and what it gains.

    `used` experts were resident when first needed, `late` ones still loading. `wasted_bytes` were moved for
    experts that became absent again before they were needed. The other fields describe the moment, not a
    period: `state` is on, off or trying, `lookahead` is how many layers ahead it guesses, and
    `gain_ms_per_token` (95 % interval: `gain_ms_low` to `gain_ms_high`) is what prefetching saves or, if off,
    would save; None if it was not measured.
    """

    issued: int = 0
    used: int = 0
    late: int = 0
    wasted_bytes: int = 0
    state: str = "off"
    lookahead: int = 0
    gain_ms_per_token: float | None = None
    gain_ms_low: float | None = None
    gain_ms_high: float | None = None

    def _with(self, other: PrefetchStats, combine: Callable[[Any, Any], Any]) -> PrefetchStats:
        counts = ("issued", "used", "late", "wasted_bytes")
        return replace(self, **{name: combine(getattr(self, name), getattr(other, name)) for name in counts})


@dataclass(frozen=True, slots=True)
class BytesMoved(_Counts):
    """Bytes by link: `h2d` host to device, `disk` from disk to RAM."""

    h2d: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class StallSeconds(_Counts):
    """Seconds in which a layer was stalled, by what it waited for.

    `demand`: a copy of a needed expert; `late_prefetch`: a copy that a prefetch had begun; `disk`: a read
    from disk; `cpu`: experts computed by the CPU; `sync`: the device, to learn the router's choice.
    """

    demand: float = 0.0
    late_prefetch: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0
    sync: float = 0.0

    @property
    def total(self) -> float:
        return self.demand + self.late_prefetch + self.disk + self.cpu + self.sync


class StarvedExpert(NamedTuple):
    """An expert that the router hardly uses. `share` is the part of the layer's tokens that chose it."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True, slots=True)
class RoutedTokens(_Counts):
    """How often each expert was chosen, `counts[layer][expert]`, by `tokens[layer]` routed tokens."""

    counts: tuple[tuple[int, ...], ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def starved(self) -> tuple[StarvedExpert, ...]:
        """Experts below STARVED_SHARE, in layers that routed at least STARVED_MIN_TOKENS tokens."""
        return tuple(
            StarvedExpert(layer, expert, count / tokens)
            for layer, (counts, tokens) in enumerate(zip(self.counts, self.tokens, strict=True))
            if tokens >= STARVED_MIN_TOKENS
            for expert, count in enumerate(counts)
            if count < STARVED_SHARE * tokens
        )


@dataclass(frozen=True, slots=True)
class Stats(_Counts):
    """Counts since load, or of one generation: the difference of two snapshots.

    A hit is a needed expert that was resident, also by a prefetch that arrived in time; a miss is a needed
    expert that was not, also if its prefetch was late. `tokens` counts generated tokens. Figures of tiers
    that do not exist are 0.
    """

    hits_by_layer: tuple[int, ...] = ()
    misses_by_layer: tuple[int, ...] = ()
    evictions: int = 0
    prefetch: PrefetchStats = field(default_factory=PrefetchStats)
    bytes: BytesMoved = field(default_factory=BytesMoved)
    stall: StallSeconds = field(default_factory=StallSeconds)
    tokens: int = 0
    routed: RoutedTokens = field(default_factory=RoutedTokens)

    @property
    def hits(self) -> int:
        return sum(self.hits_by_layer)

    @property
    def misses(self) -> int:
        return sum(self.misses_by_layer)

    @property
    def hit_rate(self) -> float | None:
        """Hits per needed expert; None if none was needed."""
        return _rate(self.hits, self.misses)

    @property
    def hit_rate_by_layer(self) -> tuple[float | None, ...]:
        return tuple(map(_rate, self.hits_by_layer, self.misses_by_layer))

    @property
    def starved(self) -> tuple[StarvedExpert, ...]:
        return self.routed.starved

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; stall is in `stall_s` and `stall_by_cause_s`, the table `routed` is left out."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "hit_rate_by_layer": list(self.hit_rate_by_layer),
            "evictions": self.evictions,
            "prefetch": asdict(self.prefetch),
            "bytes": asdict(self.bytes),
            "stall_s": self.stall.total,
            "stall_by_cause_s": asdict(self.stall),
            "tokens": self.tokens,
            "starved": [expert._asdict() for expert in self.starved],
        }


def _rate(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses else None


class CacheCounters:
    """The live counters of one cache. Only the cache writes them, except `prefetch_gain`; any code on the
    same thread may read them."""

    __slots__ = (
        "evictions",
        "hits_by_layer",
        "misses_by_layer",
        "prefetch_gain",
        "prefetch_issued",
        "prefetch_late",
        "prefetch_used",
        "prefetch_wasted_bytes",
    )

    def __init__(self, layers: int) -> None:
        self.hits_by_layer = [0] * layers
        self.misses_by_layer = [0] * layers
        self.evictions = 0
        self.prefetch_issued = 0
        self.prefetch_used = 0
        self.prefetch_late = 0
        self.prefetch_wasted_bytes = 0
        self.prefetch_gain = PrefetchStats()
        """State, lookahead and gain of prefetching, set by the prefetcher; the counts in it are ignored."""

    @property
    def hits(self) -> int:
        return sum(self.hits_by_layer)

    @property
    def misses(self) -> int:
        return sum(self.misses_by_layer)

    @property
    def prefetch(self) -> PrefetchStats:
        return replace(
            self.prefetch_gain,
            issued=self.prefetch_issued,
            used=self.prefetch_used,
            late=self.prefetch_late,
            wasted_bytes=self.prefetch_wasted_bytes,
        )

    def snapshot(
        self,
        *,
        bytes: BytesMoved | None = None,
        stall: StallSeconds | None = None,
        tokens: int = 0,
        routed: RoutedTokens | None = None,
    ) -> Stats:
        """The counts so far, together with the given figures, which are kept elsewhere."""
        return Stats(
            hits_by_layer=tuple(self.hits_by_layer),
            misses_by_layer=tuple(self.misses_by_layer),
            evictions=self.evictions,
            prefetch=self.prefetch,
            bytes=bytes or BytesMoved(),
            stall=stall or StallSeconds(),
            tokens=tokens,
            routed=routed or RoutedTokens(),
        )


class RouterLoad:
    """How often each layer's router chose each expert. One per model, shared by its tiers. Thread-safe."""

    __slots__ = ("_counts", "_lock", "_top_k", "settle")

    def __init__(self, num_experts: Sequence[int], top_k: Sequence[int]) -> None:
        """A layer has `num_experts[layer]` experts, of which each token uses `top_k[layer]`."""
        if len(num_experts) != len(top_k):
            raise ValueError(f"experts of {len(num_experts)} layers but top-k of {len(top_k)}")
        self._counts = [[0] * experts for experts in num_experts]
        self._lock = threading.Lock()
        """Held while counts change: a reader's thread first adds a device's, while another may generate."""
        self._top_k = tuple(top_k)
        self.settle: Callable[[], None] | None = None
        """Called before the counts are read, so that counts kept elsewhere can be `add`ed first."""

    def empty_twin(self) -> RouterLoad:
        """A RouterLoad for the same layers with all counts 0."""
        return RouterLoad([len(counts) for counts in self._counts], self._top_k)

    def top_k(self, layer: int) -> int:
        """Experts that each token uses."""
        return self._top_k[layer]

    def count_all(self, layer: int, experts: Sequence[int]) -> None:
        """Each of `experts` was chosen by one token; repeats count, as in a flattened [tokens, top-k]."""
        counts = self._counts[layer]
        with self._lock:
            for expert in experts:
                counts[expert] += 1

    def add(self, layer: int, counts: Sequence[int]) -> None:
        """`counts[expert]` tokens chose each expert of the layer, as torch.bincount gives them."""
        with self._lock:
            mine = self._counts[layer]
            mine[:] = [a + b for a, b in zip(mine, counts, strict=True)]

    def snapshot(self) -> RoutedTokens:
        """The counts so far. A layer's tokens are its choices divided by its top-k."""
        if self.settle is not None:
            self.settle()
        with self._lock:
            counts = tuple(map(tuple, self._counts))
        return RoutedTokens(counts, tuple(sum(c) // k for c, k in zip(counts, self._top_k, strict=True)))
