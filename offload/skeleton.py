"""Loading the dense part of a model by transformers, without ever allocating a routed expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.spec import experts_modules, model_class

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_skeleton(folder: Path, config: Any, *, dense: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model in `folder` with every experts module replaced by an OffloadedExperts.

    `dense` is "nf4" or "int8" (quantized on the way in by transformers' bitsandbytes integration, computing
    in `dtype`) or any other name, which loads in `dtype`. Only tensors that are not experts' are read. Raises
    CheckpointError if weights are missing, or if no experts module was found to replace.
    """
    cls = model_class(config)
    with _experts_swapped(cls) as swapped, _quiet_loading():
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": str(device)},
            quantization_config=_quantization(dense, dtype),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if not swapped:
        raise CheckpointError(f"{cls.__name__} has no routed experts to offload; moe-local runs Mixture-of-Experts models")
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that {cls.__name__} needs, such as {missing[0]}; download it again"
        )
    return model.eval()


@contextlib.contextmanager
def _experts_swapped(cls: type[Any]) -> Iterator[list[str]]:
    """While active, `cls.from_pretrained` replaces experts modules just before it reads weights.

    `_load_pretrained_model` is private, but the only place that runs after the model and its quantizer
    have been set up and before anything is allocated (transformers 5.17 to 5.23).
    """
    inherited = cls._load_pretrained_model
    own = cls.__dict__.get("_load_pretrained_model")
    swapped: list[str] = []

    def load(model: Any, *args: Any, **kwargs: Any) -> Any:
        for index, (name, module) in enumerate(list(experts_modules(model))):
            model.set_submodule(name, OffloadedExperts(module, index))
            swapped.append(name)
        ignored = model._keys_to_ignore_on_load_unexpected
        # Their weights are in the file and have no place in the model any more: that is meant.
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), r"(^|\.)experts\.", r"block_sparse_moe"}
        try:
            return inherited(model, *args, **kwargs)
        finally:
            model._keys_to_ignore_on_load_unexpected = ignored

    cls._load_pretrained_model = staticmethod(load)
    try:
        yield swapped
    finally:
        if own is None:
            del cls._load_pretrained_model
        else:
            cls._load_pretrained_model = own


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bar and load report: the caller shows progress."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _quantization(dense: str, dtype: torch.dtype) -> Any:
    if dense not in ("nf4", "int8"):
        return None
    from transformers import BitsAndBytesConfig

    if dense == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
