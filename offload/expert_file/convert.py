"""From a checkpoint to an expert file: every routed expert read, encoded and written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from moe_local.cache.errors import DoesNotFitError, ExpertFileError
from moe_local.cache.files import locked, sync_folder
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.spec import ModelSpec, MoELayer
from moe_local.offload.expert_file.encoder import ExpertEncoder, FormatChoice
from moe_local.offload.expert_file.expert_file import (
    MANIFEST,
    ExpertFile,
    Progress,
    StoredLayer,
    read_manifest,
)
from moe_local.offload.expert_file.expert_shard import TEMPORARY, ShardPlan, disk_errors
from moe_local.offload.expert_file.intent import Intent
from moe_local.offload.expert_file.mend import mend_shard
from moe_local.offload.expert_file.pipeline import write_shards
from moe_local.offload.expert_file.verify import damaged_experts, damaged_frame
from moe_local.offload.quantize.codec import Codec, codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.mix import Mix, is_mixed
from moe_local.offload.system.direct_io import Memory, page_memory

logger = logging.getLogger(__name__)


class ExpertSource(Protocol):
    """A source of experts to convert, such as `moe_local.offload.checkpoint.checkpoint.Checkpoint`."""

    @property
    def name(self) -> str:
        """What the user calls the model."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal experts; differs if any weight differs."""

    def read_expert(self, layer: MoELayer, expert: int, memory: Memory) -> dict[str, torch.Tensor]:
        """The tensors of `layer.tensors`, matrices [out, in], in the checkpoint's dtype, on the CPU.

        They are placed in `memory` as far as possible. Called in another thread than the other methods.
        """


def convert_experts(
    checkpoint: ExpertSource,
    codec: Codec | FormatChoice | Mix,
    folder: Path,
    progress: Progress | None = None,
    *,
    check: bool = False,
    gpu: torch.device | None = None,
) -> ExpertFile:
    """The expert file of `checkpoint` in `folder`, opened; converted first where it is not complete.

    Keeps the finished shards of an earlier run of the same checkpoint and format after comparing their
    checksums, and converts damaged experts again; with `check` does so even if the file is complete. Encodes
    on `gpu` if that is faster. Memory: two experts as read, two encoded, and small pieces. Blocks, also while
    another process converts into the same folder. Any exception leaves the finished shards and no temporary
    file.

    Raises CheckpointError (naming layer, expert and tensor) for weights that cannot be converted,
    DoesNotFitError for a full disk, ExpertFileError if the folder cannot be written, or holds another mix of
    formats that has the same name, or if the mix is for another model.
    """
    folder = Path(folder)
    encoder, plans = _planned(checkpoint, codec, gpu)
    _refuse_namesake(folder, plans)
    if not check and (complete := _complete(folder, plans)):
        return complete
    with _lock(folder):
        return _convert(checkpoint, encoder, folder, plans, progress, check)


def convert_chosen(
    checkpoint: ExpertSource,
    choose: Callable[[], Intent],
    folder: Path,
    progress: Progress | None = None,
    *,
    check: bool = False,
    gpu: torch.device | None = None,
) -> ExpertFile:
    """As `convert_experts`, to the formats that `choose` returns. It is called while the folder is locked, so
    that only one process chooses.

    The choice is written to the folder before anything else is.
    """
    with _lock(folder):
        intent = choose()
        encoder, plans = _planned(checkpoint, intent.mix or codec_for(intent.experts), gpu)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        if intent != Intent.read(folder, intent.fingerprint):
            intent.keep(folder)
        return _convert(checkpoint, encoder, folder, plans, progress, check)


def _planned(
    checkpoint: ExpertSource, codec: Codec | FormatChoice | Mix, gpu: torch.device | None
) -> tuple[ExpertEncoder, list[ShardPlan]]:
    if isinstance(codec, Mix):
        codec = FormatChoice.of(codec.check(checkpoint.spec, checkpoint.name))
    encoder = ExpertEncoder(checkpoint.name, codec, gpu)
    return encoder, _plan(checkpoint, encoder)


def _convert(
    checkpoint: ExpertSource,
    encoder: ExpertEncoder,
    folder: Path,
    plans: Sequence[ShardPlan],
    progress: Progress | None,
    check: bool,
) -> ExpertFile:
    """Convert what is not converted yet. Call with the folder locked."""
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    _refuse_namesake(folder, plans)  # another process may have written one while this one waited
    if not check and (complete := _complete(folder, plans)):
        return complete
    try:
        return _Conversion(checkpoint, encoder, folder, plans, progress).run()
    finally:
        encoder.close()


class _Conversion:
    """One run of `convert_experts`, under the lock. Knows which shards are finished, by their checksums."""

    def __init__(
        self,
        checkpoint: ExpertSource,
        encoder: ExpertEncoder,
        folder: Path,
        plans: Sequence[ShardPlan],
        progress: Progress | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.encoder = encoder
        self.folder = folder
        self.plans = plans
        self.progress = progress
        self.checksums: dict[int, tuple[int, ...]] = {}
        self.total = sum(len(plan.layouts) for plan in plans)
        self.done = self.done_bytes = 0

    def run(self) -> ExpertFile:
        with disk_errors(self.folder):
            for stale in self.folder.glob(f"*{TEMPORARY}"):
                stale.unlink()
        self._keep_finished()
        missing = [plan for plan in self.plans if plan.layer not in self.checksums]
        if not missing and (complete := _complete(self.folder, self.plans)):
            checksums = {layer: stored.checksums for layer, stored in enumerate(complete.layers)}
            if checksums == self.checksums:
                return complete
        if is_mixed(self.plans[0].format):
            self._keep_mix()
        self._clear(missing)
        written = write_shards(
            missing, self.folder, self._read, self._encode, lambda layout: self._count(layout.nbytes)
        )
        self.checksums |= {plan.layer: checksums for plan, checksums in zip(missing, written, strict=True)}
        self.check_integrity()
        return ExpertFile.finish(
            self.folder,
            self.checkpoint.name,
            self.checkpoint.spec.model_type,
            self.plans,
            [self.checksums[plan.layer] for plan in self.plans],
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless each shard is finished and each expert counted once."""
        assert set(self.checksums) == {plan.layer for plan in self.plans}
        assert self.done == self.total

    def _keep_finished(self) -> None:
        """Keep and count the shards that an earlier run finished; single damaged experts are repaired."""
        noted = self._noted()
        for plan in self.plans:
            checksums = plan.stored_checksums(self.folder) or noted.get(plan.layer)
            if checksums is not None and self._is_whole(plan, checksums):
                self.checksums[plan.layer] = checksums

    def _noted(self) -> dict[int, tuple[int, ...]]:
        """The checksums in a manifest of the same shards, for the case that a shard's header is damaged."""
        try:
            file = read_manifest(self.folder)
        except ExpertFileError:
            return {}
        if (file.fingerprint, file.format) != (self.plans[0].fingerprint, self.plans[0].format):
            return {}
        pairs = zip(self.plans, file.layers, strict=False)
        return {plan.layer: layer.checksums for plan, layer in pairs if _is_planned(layer, plan)}

    def _is_whole(self, plan: ShardPlan, checksums: tuple[int, ...]) -> bool:
        """Whether all experts of the shard have these checksums, perhaps once repaired; counts them if so."""
        path = self.folder / plan.file
        stored = StoredLayer(
            plan.layer_name, path, plan.nbytes, plan.layouts, plan.offsets(), tuple(checksums)
        )
        before = self.done, self.done_bytes
        damaged = damaged_experts([stored], self._count, plan.layer)
        whole = not damaged and damaged_frame(plan, stored) is None
        if not whole and len(damaged) < len(plan.layouts):
            experts = [damage.expert for damage in damaged if damage.expert is not None]
            whole = mend_shard(plan, stored, experts, lambda expert: self._encoded(plan, expert))
            for damage in damaged if whole else ():
                logger.warning("%s; converted it again", damage)
        if not whole:
            logger.warning("%s is damaged and will be converted again", path)
            self.done, self.done_bytes = before
        return whole

    def _encoded(self, plan: ShardPlan, expert: int) -> memoryview:
        out = page_memory(plan.layouts[expert].nbytes)
        self._encode(plan, expert, self._read(plan, expert, page_memory), out)
        view: memoryview = out.numpy().data
        return view

    def _keep_mix(self) -> None:
        """Note which formats were chosen, if the folder does not say it: its manifest is removed next."""
        first = self.plans[0]
        formats = tuple(tuple(layout.format for layout in plan.layouts) for plan in self.plans)
        known = Intent.read(self.folder, first.fingerprint)
        if known is None or known.mix is None or known.mix.formats != formats:
            mix = Mix(first.format, formats)
            Intent(self.checkpoint.name, first.fingerprint, first.format, mix).keep(self.folder)

    def _clear(self, missing: Sequence[ShardPlan]) -> None:
        """Remove the manifest and then the shards to be converted; raise if the disk has no room for them."""
        with disk_errors(self.folder):
            for name in (MANIFEST, *(plan.file for plan in missing)):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)
            free = shutil.disk_usage(self.folder).free
        need = sum(plan.nbytes for plan in missing)
        if need > free:
            raise DoesNotFitError(
                f"converting {self.checkpoint.name} to {self.plans[0].format} needs {format_bytes(need)} in "
                f"{self.folder}, which has {format_bytes(free)} free; free {format_bytes(need - free)}, "
                "or set MOE_LOCAL_HOME to a folder on a larger disk"
            )

    def _read(self, plan: ShardPlan, expert: int, memory: Memory) -> Mapping[str, torch.Tensor]:
        return self.checkpoint.read_expert(self._layer(plan), expert, memory)

    def _encode(
        self, plan: ShardPlan, expert: int, tensors: Mapping[str, torch.Tensor], out: torch.Tensor
    ) -> None:
        self.encoder.encode(self._layer(plan), expert, tensors, plan.layouts[expert], out)

    def _layer(self, plan: ShardPlan) -> MoELayer:
        return self.checkpoint.spec.layers[plan.layer]

    def _count(self, nbytes: int) -> None:
        self.done, self.done_bytes = self.done + 1, self.done_bytes + nbytes
        if self.progress is not None:
            self.progress(self.done, self.total, self.done_bytes)


def _plan(checkpoint: ExpertSource, encoder: ExpertEncoder) -> list[ShardPlan]:
    @cache  # thousands of experts share a few layouts
    def layout(name: str, tensors: tuple[TensorSpec, ...]) -> Layout:
        return by_name[name].layout(tensors)

    by_name: dict[str, Codec] = {}
    plans = []
    for layer in checkpoint.spec.layers:
        layouts = []
        for expert in range(layer.num_experts):
            chosen = encoder.codec_of(layer, expert)
            by_name[chosen.name] = chosen
            layouts.append(layout(chosen.name, layer.tensors))
        name = encoder.codec.name
        plans.append(ShardPlan(checkpoint.fingerprint, name, layer.index, layer.name, tuple(layouts)))
    return plans


def _complete(folder: Path, plans: Sequence[ShardPlan]) -> ExpertFile | None:
    """The expert file in `folder` if it is finished and holds exactly the planned shards, else None."""
    try:
        file = ExpertFile.open(folder, plans[0].fingerprint, plans[0].format)
    except ExpertFileError:
        return None
    same = len(file.layers) == len(plans) and all(map(_is_planned, file.layers, plans))
    return file if same else None


def _refuse_namesake(folder: Path, plans: Sequence[ShardPlan]) -> None:
    """Raises ExpertFileError if `folder` holds a finished mix of the same name whose experts have other
    formats, since the name does not tell which of the two is wanted."""
    if not is_mixed(plans[0].format):
        return
    try:
        file = ExpertFile.open(folder, plans[0].fingerprint, plans[0].format)
    except ExpertFileError:
        return
    pairs = [
        (there.format, planned.format)
        for layer, plan in zip(file.layers, plans, strict=False)
        for there, planned in zip(layer.layouts, plan.layouts, strict=False)
    ]
    if differ := sum(there != planned for there, planned in pairs):
        raise ExpertFileError(
            f"{folder} holds another {file.format}: {differ} of {len(pairs)} experts have other formats; "
            "remove that folder first, or convert to another one: moe-local convert MODEL --out FOLDER"
        )


def _is_planned(layer: StoredLayer, plan: ShardPlan) -> bool:
    return (layer.layouts, layer.offsets) == (plan.layouts, plan.offsets())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One conversion into `folder` at a time; says once if it waits."""

    def waiting() -> None:
        logger.warning("waiting for another process that converts to %s", folder)

    with ExitStack() as held:
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder, waiting=waiting))
        yield
