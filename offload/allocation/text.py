"""Measures a checkpoint's Sensitivity on a text, which the model reads, offloaded as usual."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_local.cache.errors import CheckpointError, DoesNotFitError, OptionError
from moe_local.offload.allocation.allocate import (
    compute_device,
    measured,
    measuring,
    partial_path,
    sensitivity_path,
)
from moe_local.offload.allocation.expected import candidates
from moe_local.offload.allocation.measure import TOKENS, Measurement, check_text, read_text, text_name
from moe_local.offload.allocation.sensitivity import Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from moe_local.offload.quantize.codec import NATIVE
from moe_local.offload.system.progress import Progress

if TYPE_CHECKING:
    from moe_local.offload.model import Model

logger = logging.getLogger(__name__)

RUN_IN = (NATIVE, "int8", "nf4")
"""Formats of the experts while the model reads the text; the first that can be loaded is used. The
checkpoint's own format needs no conversion, and is what the others are compared with."""


def calibrate(
    model: str | Path,
    text: str,
    *,
    tokens: int = TOKENS,
    progress: Progress | None = None,
    **options: Any,
) -> Sensitivity:
    """Measure `model` on the first `tokens` of a text, and store the result for all later mixes of it.

    A stored result for the same text is returned as it is, also one that another process is measuring, for
    which this one waits. `options` are those of load() except `experts` and `prefetch`.
    Raises OptionError for too little text and for models that cannot read one (without a tokenizer, or with
    an encoder), and whatever `load` raises.
    """
    checkpoint = Checkpoint.open(resolve(model), str(model))
    if getattr(checkpoint.config, "is_encoder_decoder", False):
        raise OptionError(
            f"{checkpoint.name} is an encoder-decoder, for which a text cannot be used; leave it out"
        )
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.gguf)
    if tokenizer is None:
        raise OptionError(f"the checkpoint of {checkpoint.name} has no tokenizer, so no text can be read")
    ids = tokenizer(text[: 16 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    check_text(ids, checkpoint.spec.vocab_size)
    formats, path, name = candidates(checkpoint.spec.dtype), sensitivity_path(checkpoint), text_name(ids)

    def kept() -> Sensitivity | None:
        found = Sensitivity.read(path, checkpoint.fingerprint)
        if found is None or not found.is_of(checkpoint.spec):
            return None
        return found if found.text == name and found.measured(formats) else None

    if (found := kept()) is not None:
        return found
    with measuring(checkpoint):
        if (found := kept()) is not None:  # stored by the process that was waited for
            return found
        with _running(model, progress, options) as loaded:
            try:
                reading = read_text(loaded.hf, ids, progress)
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(
                    f"reading the text with {checkpoint.name} takes more VRAM than there is; "
                    "give it less for experts (--vram), or leave the text out"
                ) from error
        measurement = Measurement(
            checkpoint, formats, reading, partial_path(path), compute_device(), progress
        )
        return measured(checkpoint, measurement)


def _running(model: str | Path, progress: Progress | None, options: dict[str, Any]) -> Model:
    """Load the model in the first of RUN_IN that succeeds. Raises as `load` does for the last of them."""
    from moe_local.offload.load import load

    for number, experts in enumerate(RUN_IN):
        try:
            return load(model, experts=experts, prefetch="off", progress=progress, **options)
        except (DoesNotFitError, CheckpointError) as error:
            if number == len(RUN_IN) - 1:
                raise
            logger.info("%s: experts=%r: %s", model, experts, error)
    raise AssertionError("no format to run in")
