"""The experts of a model as they are run: converted on first use, found again later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.allocation.allocate import check_mixed
from moe_local.offload.allocation.intend import begun_for, finished_mix, intend
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.expert_file.convert import convert_chosen, convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.intent import Intent
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.auto import go_on
from moe_local.offload.plan.fit import fit
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Plan
from moe_local.offload.quantize.codec import NATIVE, Codec, codec_for
from moe_local.offload.quantize.mix import AUTO, MIXED, Mix, is_mixed
from moe_local.offload.system.home import expert_file_folder, moe_local_home
from moe_local.offload.system.progress import Progress


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
    if experts == AUTO:
        plan = (fit(model, experts=AUTO) if plan is None else plan).check()
    checkpoint = Checkpoint.open(resolve(model), str(model))
    misses = budget = None
    if experts == AUTO and plan is not None:
        request, misses, budget = plan.request, MissCost.of_plan(plan), plan.request.budget
        begun = begun_conversions(checkpoint, budget, out)
        experts = go_on(lambda name: place(replace(request, experts=name)), begun) or request.experts
    device = LoadOptions().torch_device()
    gpu = device if device.type == "cuda" else None
    file = open_experts(
        checkpoint, experts, out, progress=progress, check=check, gpu=gpu, misses=misses, budget=budget
    )
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
    budget: str | None = None,
) -> ExpertFile | NativeExperts:
    """The expert file of a checkpoint in format `experts`, converted first if need be, on `gpu` if faster.

    With "native" that is the checkpoint itself. `misses`: what a new mix is to weigh beside errors. `budget`:
    what "auto" was to fit when it came to `experts`. What was chosen is kept, so that a conversion that is
    interrupted goes on with it.
    """
    folder = Path(out) if out is not None else _home_folder(checkpoint, experts)
    if experts == NATIVE:
        return NativeExperts(checkpoint, folder)

    def report(done: int, total: int, nbytes: int) -> None:
        if progress is not None:
            progress("converting", done, total)

    form = _certain(checkpoint, experts, folder, budget)
    if form is not None:
        return convert_experts(checkpoint, form, folder, report, check=check, gpu=gpu)

    def choose() -> Intent:
        return intend(checkpoint, experts, folder, budget=budget, misses=misses, progress=progress)

    return convert_chosen(checkpoint, choose, folder, report, check=check, gpu=gpu)


def _certain(checkpoint: Checkpoint, experts: str, folder: Path, budget: str | None) -> Codec | Mix | None:
    """The format or finished mix that `experts` names, if nothing is left to choose; else None."""
    if is_mixed(experts):
        found = finished_mix(checkpoint, experts, folder)
        if found is None:
            check_mixed(experts, checkpoint.spec, checkpoint.name)  # before anything is waited for
        return found
    return codec_for(experts) if budget is None or (folder / MANIFEST).is_file() else None


def _home_folder(checkpoint: Checkpoint, experts: str) -> Path:
    return expert_file_folder(moe_local_home(), checkpoint.name, experts, checkpoint.fingerprint)


def _home_folders(checkpoint: Checkpoint) -> list[Path]:
    """The folders to which this checkpoint was converted, in any format, completely or not."""
    ending = f"-{checkpoint.fingerprint[:16]}"
    folders = _home_folder(checkpoint, MIXED).parent.glob(f"*{ending}")
    return sorted(folder for folder in folders if folder.is_dir())


def converted_mixes(checkpoint: Checkpoint) -> list[str]:
    """The "mixed:BITS" that this checkpoint has been converted to, completely."""
    ending = f"-{checkpoint.fingerprint[:16]}"
    return [
        f"{MIXED}:{folder.name.removeprefix(f'{MIXED}-').removesuffix(ending)}"
        for folder in _home_folders(checkpoint)
        if folder.name.startswith(f"{MIXED}-") and (folder / MANIFEST).is_file()
    ]


def begun_conversions(checkpoint: Checkpoint, budget: str | None, out: str | Path | None = None) -> list[str]:
    """What experts "auto" came to in interrupted conversions of this checkpoint that had to fit the same
    `budget`: the one into `out`, or those below MOE_LOCAL_HOME."""
    if budget is None:
        return []
    return begun_for(checkpoint, budget, _home_folders(checkpoint) if out is None else [Path(out)])
