"""What the first use of a model will download and write, known before anything is downloaded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moe_local.cache.errors import DoesNotFitError
from moe_local.cache.files import file_bytes, nearest_folder
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.hub import cached_folder, config_of, locate, to_download
from moe_local.offload.checkpoint.hub_download import MARGIN_BYTES, blobs_folder
from moe_local.offload.checkpoint.spec import model_spec
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.fit import plan_load
from moe_local.offload.quantize.codec import NATIVE
from moe_local.offload.system.home import expert_file_folder, moe_local_home


@dataclass(frozen=True, slots=True)
class FirstUse:
    """What `load` is about to download and to write."""

    model: str
    download_bytes: int
    """Bytes to download: those that the Hub cache does not have yet."""
    cache: Path
    """The Hub cache."""
    convert_bytes: int
    """Bytes of converted experts to write below `home`; 0 if experts are read as they are stored."""
    home: Path

    def check(self) -> None:
        """Raise DoesNotFitError if there is too little space on the disk, or on one of the two disks."""
        needs = [(self.cache, self.download_bytes, "HF_HUB_CACHE")]
        needs += [(self.home, self.convert_bytes, "MOE_LOCAL_HOME")]
        if nearest_folder(self.cache).stat().st_dev == nearest_folder(self.home).stat().st_dev:
            needs = [(self.cache, self.download_bytes + self.convert_bytes, "HF_HUB_CACHE or MOE_LOCAL_HOME")]
        for folder, nbytes, variable in needs:
            free = shutil.disk_usage(nearest_folder(folder)).free
            if nbytes and nbytes + MARGIN_BYTES > free:
                raise DoesNotFitError(
                    f"{self.model} needs {format_bytes(nbytes + MARGIN_BYTES)} of disk for {self}, and "
                    f"{format_bytes(free)} are free in {folder}; make room or set {variable} to a "
                    "folder on a larger disk"
                )

    def __str__(self) -> str:
        text = f"{format_bytes(self.download_bytes)} of download"
        if self.convert_bytes:
            text += f" and {format_bytes(self.convert_bytes)} of converted experts"
        return text


def first_use(model: str, options: LoadOptions, *, memory: bool = True) -> FirstUse | None:
    """What loading `model` with these options will download and write; None if its checkpoint is present.

    Asks the Hub for the config and the names and sizes of the files. Raises as `load`, including
    DoesNotFitError if disk or, unless `memory` is False, VRAM or RAM are too small.
    """
    found = locate(model)
    if isinstance(found, Path) or cached_folder(found.repo_id) is not None:
        return None
    home = moe_local_home()
    spec = model_spec(config_of(model, to_load=True))
    plan = plan_load(model, spec, options, options.torch_devices(), bandwidth.saved(home))
    if memory:
        plan.check()
    converted = 0
    if options.experts != NATIVE:
        # For "auto" this is the planned format; a load may use a converted mix of other bits instead.
        place = expert_file_folder(home, model, plan.request.experts, "*")
        here = [
            path for folder in place.parent.glob(place.name) for path in folder.glob("layer-*.safetensors")
        ]
        converted = max(0, plan.bytes.experts_total - sum(map(file_bytes, here)))
    use = FirstUse(model, to_download(model), blobs_folder(found.repo_id).parent.parent, converted, home)
    use.check()
    return use
