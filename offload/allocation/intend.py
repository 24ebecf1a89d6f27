"""Decides what a conversion is to produce: the mix that was begun, while it is still valid, or a new one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moe_local.cache.errors import ExpertFileError
from moe_local.cache.files import file_bytes
from moe_local.offload.allocation.allocate import allocate, sensitivity_path
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.allocation.sensitivity import Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.intent import Intent
from moe_local.offload.quantize.mix import Mix, is_mixed
from moe_local.offload.system.progress import Progress

logger = logging.getLogger(__name__)

GOING_ON = "going on with the %s that was chosen when this conversion began; to choose anew, remove %s"
OUTDATED = "a text was read since the conversion to %s began, so its formats are chosen anew"


def intend(
    checkpoint: Checkpoint,
    experts: str,
    folder: Path,
    *,
    budget: str | None = None,
    misses: MissCost | None = None,
    progress: Progress | None = None,
) -> Intent:
    """What `folder` is to hold for canonical `experts`: the mix finished or begun there, else a new one.

    `budget`: the budget that "auto" had when it chose these experts. To be called with the folder locked, so
    that only one of two processes chooses. Raises as `allocate` does.
    """
    finished = finished_mix(checkpoint, experts, folder)
    begun = Intent.read(folder, checkpoint.fingerprint, say=budget is None and finished is None)
    if begun is not None and begun.experts != experts:  # the user's own folder, begun for other experts
        begun = None
    if finished is not None and (begun is None or begun.mix != finished):
        return _intent(checkpoint, experts, finished, budget)
    if begun is not None and (finished is not None or _holds(checkpoint, begun)):
        if finished is None:
            logger.warning(GOING_ON, experts, folder)
        return begun if budget is None else replace(begun, budget=budget)
    if begun is not None:
        logger.warning(OUTDATED, experts)
    if not is_mixed(experts):
        return _intent(checkpoint, experts, None, budget)
    found = allocate(checkpoint, experts, misses=misses, progress=progress)
    return _intent(checkpoint, experts, found.mix, budget, found.text)


def begun_for(checkpoint: Checkpoint, budget: str, folders: Iterable[Path]) -> list[str]:
    """The values of `experts` that "auto" chose before with this budget, for those of the folders whose
    conversion was interrupted and is still valid; the folder with the most bytes comes first."""
    found = []
    for folder in folders:
        if (folder / MANIFEST).is_file():
            continue
        intent = Intent.read(folder, checkpoint.fingerprint, say=True)
        if intent is not None and intent.budget == budget and _holds(checkpoint, intent):
            nbytes = sum(map(file_bytes, folder.iterdir()))
            found.append((nbytes, intent.experts))
    return [experts for _, experts in sorted(found, reverse=True)]


def finished_mix(checkpoint: Checkpoint, experts: str, folder: Path) -> Mix | None:
    """The mix in `folder`, if that is a finished conversion to this "mixed:BITS"; else None."""
    if not is_mixed(experts):
        return None
    try:
        return ExpertFile.open(folder, checkpoint.fingerprint, experts).mix
    except ExpertFileError:
        return None


def _holds(checkpoint: Checkpoint, begun: Intent) -> bool:
    """Whether a begun choice is still valid: no other text to choose by has been read since then.

    Other bits or another budget of "auto" need no check: these are told apart by the folder's name and by
    `begun_for`. How much memory is free now, or what another version would choose, does not matter.
    """
    if begun.mix is None:
        return True
    try:
        begun.mix.check(checkpoint.spec, checkpoint.name)
    except ExpertFileError:
        return False
    kept = Sensitivity.read(sensitivity_path(checkpoint), checkpoint.fingerprint)
    return kept is None or kept.text in (None, begun.text)


def _intent(
    checkpoint: Checkpoint, experts: str, mix: Mix | None, budget: str | None, text: str | None = None
) -> Intent:
    return Intent(checkpoint.name, checkpoint.fingerprint, experts, mix, budget, text)
