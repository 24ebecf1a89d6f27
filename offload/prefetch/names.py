"""The prefetchers by the names users write, their own included. Without torch: options are checked here."""

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
"""Those that come with the package."""

OWN: dict[str, MakePrefetcher] = {}
"""Those that `register_prefetcher` was given."""


def register_prefetcher(name: str, make: MakePrefetcher) -> None:
    """Let users choose a prefetcher of their own by this name, as `load(prefetch=name)`.

    `make` is given the store to request experts of and the router of each MoE layer (None where there is no
    telling); it is not called where everything is resident. Lasts as long as the process. Raises OptionError
    for a name that is taken, except by the same `make`.
    """
    if OWN.get(name) is make:
        return
    if name in prefetchers():
        raise OptionError(f"prefetch {name!r} already exists; choose another name")
    OWN[name] = make


def prefetchers() -> list[str]:
    """What the option `prefetch` may be."""
    return [*PREFETCH, *OWN]
