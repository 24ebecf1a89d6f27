"""The eviction policies by the names users write."""

from __future__ import annotations

from collections.abc import Callable

from moe_local.cache.adaptive import AdaptivePolicy
from moe_local.cache.errors import OptionError
from moe_local.cache.fifo import FIFOPolicy
from moe_local.cache.lfu import LFUPolicy
from moe_local.cache.lru import LRUPolicy
from moe_local.cache.policy import EvictionPolicy

POLICIES: dict[str, Callable[[], Callable[[], EvictionPolicy]]] = {
    "lru": lambda: LRUPolicy,
    "lfu": lambda: LFUPolicy,
    "adaptive": AdaptivePolicy.family,
    "fifo": lambda: FIFOPolicy,
}
"""For each name, a function that is called once per cache. It returns the factory of the policies of that
cache's layers, which can thus share what they learn."""


def register_policy(name: str, make: Callable[[], EvictionPolicy]) -> None:
    """Let users choose a policy of their own by this name, as `load(policy=name)` and in benchmarks.

    `make` is called for each layer of each tier. Lasts as long as the process. Raises OptionError for a name
    that is taken, except by the same `make`.
    """
    if not isinstance(name, str) or not callable(make):
        raise OptionError(f"eviction policy {name!r}: {make!r}; give a name, and a function that makes one")
    known = _own.get(name)
    if known is make:
        return
    if known is not None or name in POLICIES:
        raise OptionError(f"eviction policy {name!r} already exists; choose another name")
    _own[name] = make
    POLICIES[name] = lambda: make


_own: dict[str, Callable[[], EvictionPolicy]] = {}


def policy_for(name: str) -> Callable[[], EvictionPolicy]:
    """A factory of one cache's policies, one for each layer. Raises OptionError for unknown names."""
    if name not in POLICIES:
        raise OptionError(f"eviction policy {name!r} is not known; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
