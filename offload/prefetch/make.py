"""Makes the prefetcher that the option `prefetch` names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from moe_local.cache.errors import ExpertFileError, OptionError
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.plan.plan import Plan
from moe_local.offload.prefetch.auto import AutoPrefetcher
from moe_local.offload.prefetch.correction import Correction, read_corrections
from moe_local.offload.prefetch.names import OWN
from moe_local.offload.prefetch.predictor import RouterPredictor
from moe_local.offload.prefetch.prefetch import NoPrefetch, Prefetcher
from moe_local.offload.prefetch.router_prefetcher import RouterPrefetcher
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.store.store import ExpertStore

logger = logging.getLogger(__name__)


def make_prefetcher(
    name: str,
    plan: Plan,
    store: ExpertStore,
    sites: Sequence[RouterSite | None],
    file: ExpertFile | NativeExperts,
) -> Prefetcher:
    """The prefetcher called `name`, one of names.prefetchers().

    "learned" needs the corrections that `moe-local calibrate` writes beside the expert file. Without them it
    raises OptionError, and ExpertFileError if they cannot be used. It does so even where all experts are
    resident, so that an option behaves alike on smaller machines. "auto" uses corrections if there are any.
    """
    experts = plan.request.experts
    if plan.mode == "resident":
        if name == "learned":
            _corrections(file, sites, experts, required=True)
        return NoPrefetch()
    if name == "off":
        return NoPrefetch()
    if name in OWN:
        return OWN[name](store, sites)
    corrections = None if name == "router" else _corrections(file, sites, experts, name == "learned")
    predictor = RouterPredictor(store, sites, corrections)
    if name == "auto":
        return AutoPrefetcher(store, predictor, copy_seconds=_copy_seconds(store, plan))
    counters = store.tier.cache.stats
    counters.prefetch_gain = replace(counters.prefetch_gain, state="on", lookahead=1)
    return RouterPrefetcher(store, predictor)


def _corrections(
    file: ExpertFile | NativeExperts, sites: Sequence[RouterSite | None], experts: str, required: bool
) -> dict[tuple[int, int], Correction]:
    if isinstance(file, NativeExperts):
        if required:
            raise OptionError(
                "prefetch 'learned' needs a calibration, which lies beside converted experts, and experts is "
                "'native'; use another format, or prefetch 'auto'"
            )
        return {}
    try:
        kept = read_corrections(file.folder, file.fingerprint)
    except ExpertFileError as error:
        if required:
            raise
        logger.warning("%s; guessing without it", error)
        kept = {}
    if kept is None and required:
        raise OptionError(
            f"prefetch 'learned' needs a calibration, and {file.folder} has none; "
            f"run moe-local calibrate MODEL --experts {experts}, or use prefetch 'auto'"
        )
    fitting = {}
    for (layer, distance), correction in (kept or {}).items():
        site = sites[layer + distance] if layer + distance < len(sites) else None
        like = next(site.norm.parameters(), None) if site is not None else None
        if like is not None and correction.bias.shape == like.shape[-1:]:
            fitting[layer, distance] = correction.to(like.detach())
    return fitting


def _copy_seconds(store: ExpertStore, plan: Plan) -> Callable[[int], float] | None:
    """The function that gives the seconds of a copy to the device; None without a device, where demand loads
    overtake prefetches from disk."""
    if store.below is None:
        return None
    if store.host is not None:
        return store.host.scheduler.costs.link_seconds
    rate = plan.request.bandwidths.h2d
    return lambda nbytes: nbytes / rate
