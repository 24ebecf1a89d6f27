"""Converts damaged experts again, from the checkpoint that the expert file was made from."""

from __future__ import annotations

from pathlib import Path

from moe_local.cache.errors import ExpertFileError
from moe_local.cache.keys import ExpertKey
from moe_local.offload.expert_file.convert import ExpertSource, convert_experts
from moe_local.offload.expert_file.encoder import FormatChoice
from moe_local.offload.expert_file.expert_file import ExpertFile, Progress, read_manifest
from moe_local.offload.quantize.codec import Codec, codec_for


def repair_experts(folder: Path, checkpoint: ExpertSource, progress: Progress | None = None) -> ExpertFile:
    """Repair the expert file in `folder`; every expert keeps its format.

    Reads and compares all experts; only damaged ones are read from the checkpoint. A process that has the
    file open may go on reading it. Raises ExpertFileError if the manifest is unreadable or names another
    checkpoint, and as `convert_experts`.
    """
    file = read_manifest(folder)
    if file.fingerprint != checkpoint.fingerprint:
        raise ExpertFileError(
            f"{folder} was converted from another checkpoint (fingerprint {file.fingerprint[:16]}, that of "
            f"{checkpoint.name} is {checkpoint.fingerprint[:16]}), so nothing here can repair it; "
            "remove it: moe-local rm MODEL"
        )

    def codec_of(key: ExpertKey) -> Codec:
        return codec_for(file.layout(*key).format)

    choice = FormatChoice(file.format, codec_of)
    return convert_experts(checkpoint, choice, folder, progress, check=True)
