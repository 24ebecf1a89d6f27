"""Fits corrections to what a model computes on some text, and judges them on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.prefetch.correction import Correction, fit
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.recorder import Recorder
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.system.progress import Progress

WINDOW = 256
"""Tokens in one forward."""
FEWEST_TOKENS = 512
MOST_RANK = 64
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
JUDGED, CHOSEN_BY = 5, 10
"""One window in JUDGED is held out to judge by, and one in CHOSEN_BY to choose the ridge by."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of a layer's chosen experts that were guessed, on held-out text; `by_layer` in forward order."""

    distance: int
    plain: float
    """The recall of the later router without a correction."""
    corrected: float
    by_layer: tuple[tuple[int, float, float], ...]
    """(layer guessed, plain, corrected)"""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The corrections that were fitted, and how good they are."""

    corrections: dict[tuple[int, int], Correction]
    """By (layer, distance); only where a correction beat the plain router on text it was not fitted to."""
    recalls: tuple[Recall, ...]
    fitted_tokens: int
    judged_tokens: int


def calibrate(
    hf: Any, windows: Sequence[Sequence[int]], *, lookahead: int = 4, progress: Progress | None = None
) -> Calibration:
    """Run the model over `windows` (token ids, each an independent text) and fit corrections for each
    distance up to `lookahead` layers.

    `hf` is a loaded model's `Model.hf`. Raises OptionError for too little text and MoeLocalError for a
    model none of whose routers can be corrected.
    """
    tokens = sum(map(len, windows))
    if tokens < FEWEST_TOKENS or len(windows) < JUDGED:
        raise OptionError(
            f"{tokens} tokens in {len(windows)} windows are too few to calibrate on; "
            f"give a text of {JUDGED * WINDOW} tokens at least, and let all of it be read (--tokens)"
        )
    with torch.inference_mode():
        sites, states = _record(hf, windows, progress)
        parts = [_part(i) for i in range(len(windows)) for _ in windows[i]]
        masks = {name: torch.tensor([part == name for part in parts]) for name in ("fit", "choose", "judge")}
        pairs = [
            (layer, distance)
            for distance in range(1, lookahead + 1)
            for layer in range(len(sites) - distance)
            if sites[layer] is not None and _weight(sites[layer + distance]) is not None
        ]
        if not pairs:
            raise MoeLocalError("no router of this model reads a norm's output alone; nothing to calibrate")
        corrections, rows = {}, []
        for done, pair in enumerate(pairs):
            correction, row = _fit_pair(sites, states, masks, *pair)
            rows.append(row)
            if correction is not None:
                corrections[pair] = correction
            if progress is not None:
                progress("fitting", done + 1, len(pairs))
    recalls = tuple(_summary(d, [r for r in rows if r[0] == d]) for d in sorted({r[0] for r in rows}))
    return Calibration(corrections, recalls, int(masks["fit"].sum()), int(masks["judge"].sum()))


def windows_of(ids: Sequence[int], most: int) -> list[list[int]]:
    """The first `most` token ids of one long text, cut into windows."""
    return [list(ids[start : min(start + WINDOW, most)]) for start in range(0, min(len(ids), most), WINDOW)]


@dataclass(frozen=True, slots=True)
class _States:
    residuals: list[torch.Tensor]
    """One [N, D] tensor per layer; empty for a layer without a site."""
    chosen: list[torch.Tensor]
    """One [N, K] tensor per layer."""


def _record(
    hf: Any, windows: Sequence[Sequence[int]], progress: Progress | None
) -> tuple[list[RouterSite | None], _States]:
    with Probe(hf) as probe:
        hf(input_ids=torch.tensor([list(windows[0][:1])], device=hf.device), use_cache=False)
    with Recorder(hf, probe.sites) as recorder:
        for done, window in enumerate(windows):
            hf(input_ids=torch.tensor([list(window)], device=hf.device), use_cache=False)
            if progress is not None:
                progress("reading", done + 1, len(windows))
    joined = [[_cat(kept) for kept in lists] for lists in (recorder.residuals, recorder.chosen)]
    return probe.sites, _States(*joined)


def _fit_pair(
    sites: Sequence[RouterSite | None],
    states: _States,
    masks: dict[str, torch.Tensor],
    layer: int,
    distance: int,
) -> tuple[Correction | None, tuple[int, int, float, float]]:
    """(the best correction of one pair or None if none helps, (distance, target, plain recall, corrected
    recall))."""
    target = layer + distance
    site = sites[target]
    weight = _weight(site)
    assert site is not None
    assert weight is not None
    now, later, chosen = states.residuals[layer], states.residuals[target], states.chosen[target]

    def reads(residual: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return site.read(residual[mask].to(weight))

    def recall(mask: torch.Tensor, correction: Correction | None) -> float:
        like = correction.to(weight) if correction is not None else None
        return _recall(site.route(now[mask].to(weight), like)[1].cpu(), chosen[mask])

    rank = min(MOST_RANK, weight.shape[0])
    fits = fit(reads(now, masks["fit"]), reads(later, masks["fit"]), weight, rank, RIDGES)
    tried = [(recall(masks["choose"], correction), i) for i, correction in enumerate(fits)]
    best, which = max(tried)
    correction = fits[which] if best > recall(masks["choose"], None) else None
    plain = recall(masks["judge"], None)
    return correction, (distance, target, plain, recall(masks["judge"], correction))


def _recall(guessed: torch.Tensor, chosen: torch.Tensor) -> float:
    """Share of `chosen` that is in the same token's row of `guessed`; both [N, K]."""
    return float((guessed[:, :, None] == chosen[:, None, :]).any(1).float().mean())


def _summary(distance: int, rows: Sequence[tuple[int, int, float, float]]) -> Recall:
    by_layer = tuple((target, plain, corrected) for _, target, plain, corrected in rows)
    mean = [sum(row[i] for row in by_layer) / len(by_layer) for i in (1, 2)]
    return Recall(distance, mean[0], mean[1], by_layer)


def _part(window: int) -> str:
    if window % JUDGED == JUDGED - 1:
        return "judge"
    return "choose" if window % CHOSEN_BY == 2 else "fit"


def _weight(site: RouterSite | None) -> torch.Tensor | None:
    return site.weight if site is not None else None


def _cat(kept: Iterable[torch.Tensor]) -> torch.Tensor:
    kept = list(kept)
    return torch.cat(kept) if kept else torch.empty(0, 0)
