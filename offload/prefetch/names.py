"""The names of prefetchers, with those that users register. Without torch: options are checked with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe_local.cache.errors import OptionError

if TYPE_CHECKING:
    from moe_local.offload.prefetch.prefetch import Prefetcher
    from moe_local.offload.prefetch.routers import RouterSite
    from moe_local.offload.store.store import ExpertStore

    MakePrefetcher = Callable[[ExpertStore, Sequence[RouterSite | None]], Prefetcher]

PREFETCH = ("auto", "off", "router", "learned")
"""The names of the prefetchers in this package."""

OWN: dict[str, MakePrefetcher] = {}
"""The prefetchers that were registered with `register_prefetcher`, by name."""


def register_prefetcher(name: str, make: MakePrefetcher) -> None:
    """Let users choose a prefetcher of their own by this name, as `load(prefetch=name)`.

    `make` is given the store to request experts of and the router of each MoE layer (None where there is no
    telling); it is not called where everything is resident. Lasts as long as the process. Raises OptionError
    for a name that is taken, except by the same `make`.
    """
    if not isinstance(name, str) or not callable(make):
        raise OptionError(f"prefetch {name!r}: {make!r}; give a name, and a function that makes one")
    if OWN.get(name) is make:
        return
    if name in prefetchers():
        raise OptionError(f"prefetch {name!r} already exists; choose another name")
    OWN[name] = make


def prefetchers() -> list[str]:
    """The values that the option `prefetch` may have."""
    return [*PREFETCH, *OWN]
