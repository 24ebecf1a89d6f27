"""The experts of a model as they are run: converted on first use, found again later."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.allocation.allocate import form_of
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.expert_file.convert import (
    OtherMixError,
    convert_experts,
    expert_file_folder,
    moe_local_home,
)
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import fit
from moe_local.offload.plan.plan import Plan
from moe_local.offload.progress import Progress
from moe_local.offload.quantize.codec import NATIVE
from moe_local.offload.quantize.mix import AUTO, MIXED


def convert(
    model: str | Path,
    out: str | Path | None = None,
    experts: str = "nf4",
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
    check: bool = False,
) -> Path:
    """Convert the routed experts of `model` to an expert file and return its folder.

    `out`: where to; default below MOE_LOCAL_HOME, where `load` looks. Finished parts of an earlier run are
    kept; with `check`, those of a finished one are compared with their checksums, too. `plan` says what
    experts "auto" come to, and what is missed then; None: that of `fit` for this machine. Raises as `load`.
    """
    if experts == NATIVE:
        raise OptionError('experts="native" reads the checkpoint itself, so there is nothing to convert')
    experts = LoadOptions(experts=experts).experts
    misses = None
    if experts == AUTO:
        plan = fit(model, experts=AUTO) if plan is None else plan
        experts, misses = plan.check().request.experts, MissCost.of_plan(plan)
    checkpoint = Checkpoint.open(resolve(model), str(model))
    device = LoadOptions().torch_device()
    gpu = device if device.type == "cuda" else None
    file = open_experts(checkpoint, experts, out, progress=progress, check=check, gpu=gpu, misses=misses)
    return file.folder


def open_experts(
    checkpoint: Checkpoint,
    experts: str,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
    check: bool = False,
    gpu: torch.device | None = None,
    misses: MissCost | None = None,
) -> ExpertFile | NativeExperts:
    """The expert file of a checkpoint in format `experts`, converted first if need be, on `gpu` if faster.

    With "native" that is the checkpoint itself. `misses`: what a new mix is to weigh beside errors.
    """
    folder = Path(out) if out is not None else _home_folder(checkpoint, experts)
    if experts == NATIVE:
        return NativeExperts(checkpoint, folder)

    def report(done: int, total: int, nbytes: int) -> None:
        if progress is not None:
            progress("converting", done, total)

    form = form_of(checkpoint, experts, folder, misses=misses, progress=progress)
    try:
        return convert_experts(checkpoint, form, folder, report, check=check, gpu=gpu)
    except OtherMixError:  # another process made its own of this name meanwhile: that is as good
        form = form_of(checkpoint, experts, folder, misses=misses, progress=progress)
        return convert_experts(checkpoint, form, folder, report, check=check, gpu=gpu)


def _home_folder(checkpoint: Checkpoint, experts: str) -> Path:
    return expert_file_folder(moe_local_home(), checkpoint.name, experts, checkpoint.fingerprint)


def converted_mixes(checkpoint: Checkpoint) -> list[str]:
    """The "mixed:BITS" that are there of this checkpoint, whole."""
    pattern = _home_folder(checkpoint, f"{MIXED}:*").name
    folders = _home_folder(checkpoint, MIXED).parent.glob(pattern)
    ending = f"-{checkpoint.fingerprint[:16]}"
    return sorted(
        f"{MIXED}:{folder.name.removeprefix(f'{MIXED}-').removesuffix(ending)}"
        for folder in folders
        if (folder / MANIFEST).is_file()
    )
