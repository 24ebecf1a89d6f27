"""Ablations: one loaded model, with parts of it switched off or exchanged between runs.

All variants use one model, so that they have the same memory, the same learned costs and the same
disturbances, and so that a model that fills the machine can be measured at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moe_local.cache.policies import POLICIES
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.model import Model
from moe_local.offload.options import LoadOptions
from moe_local.offload.prefetch.prefetch import NoPrefetch


@dataclass(frozen=True, slots=True)
class Variant:
    """How a variant differs from the model as it was loaded; None: not at all."""

    name: str
    cache: bool = True
    """False: the cache is emptied before each decode step."""
    prefetch: bool = True
    policy: str | None = None
    miss: str | None = None
    device: bool = True
    """False: the host serves misses of single tokens, even if they were left to the device."""


AS_LOADED = Variant("as loaded")


class Switches:
    """Turns a loaded model, which it does not own, into its variants and back, between two answers."""

    def __init__(self, model: Model, options: LoadOptions) -> None:
        """`options`: those that the model was loaded with."""
        self._store = model.parts.store
        self._prefetcher = model.parts.prefetcher
        self._runner = expert_runner(model)
        self._options = options
        self._resident = model.plan.mode == "resident"
        self._host = self._store.host
        self._switch = model.parts.switch
        self._left_to_device = self._switch is not None and self._switch.on_device

    def variants(self) -> list[Variant]:
        """All that make sense for the model: each part left out, every other policy and every other `miss`.

        Empty if every expert has a slot for good, since there is nothing to leave out then.
        """
        if self._resident:
            return []
        found = [Variant("no cache", cache=False, prefetch=False)]
        if not isinstance(self._prefetcher, NoPrefetch):
            found.append(Variant("no prefetch", prefetch=False))
        if self._left_to_device:
            found.append(Variant("misses by the host", device=False))
        found += [Variant(f"policy {name}", policy=name) for name in POLICIES if name != self._options.policy]
        if self._host is not None:
            found += [
                Variant(f"miss {m}", miss=m) for m in ("fetch", "cpu", "auto") if m != self._options.miss
            ]
        return found

    def begin(self, variant: Variant) -> None:
        """Turn the model into this variant, with an empty cache."""
        if self._switch is not None and self._left_to_device:
            self._switch.turn(to_device=variant.device and variant.miss is None)
        self._runner.prefetcher = self._prefetcher if variant.prefetch else NoPrefetch()
        if self._store.prefill is not None:
            self._store.prefill.ahead = variant.prefetch and self._options.prefetch != "off"
        miss = variant.miss or self._options.miss
        self._store.host = None if miss == "fetch" else self._host
        if self._host is not None and miss != "fetch":
            self._host.scheduler.mode = miss
        self._store.empty(variant.policy or self._options.policy)

    def restore(self) -> None:
        """Turn the model back into what was loaded."""
        self.begin(AS_LOADED)


def expert_runner(model: Model) -> ExpertRunner:
    """The ExpertRunner that all layers of a model share, without recorders or players around it."""
    runner: Any = next(m.runner for m in model.hf.modules() if isinstance(m, OffloadedExperts))
    while not isinstance(runner, ExpertRunner):
        runner = runner.inner
    return runner


@contextmanager
def timed_syncs(model: Model) -> Iterator[None]:
    """Also count, as a stall, the time in which a device idles until the host knows the router's choice."""
    runner = expert_runner(model)
    runner.times_sync = True
    try:
        yield
    finally:
        runner.times_sync = False
