"""Loads the dense part of a model through transformers, without ever allocating a routed expert."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.dense_weights import DenseWeights
from moe_local.offload.checkpoint.spec import (
    class_config,
    experts_modules,
    meta_model,
    model_class,
    quantized_weights,
)
from moe_local.offload.dense.attention import use_single_query_attention
from moe_local.offload.dense.attention_trial import use_token_attention
from moe_local.offload.dense.delta_rule import use_native_delta_rule
from moe_local.offload.dense.fused_norm import use_fused_norms
from moe_local.offload.dense.gated_norm import use_native_gated_norms
from moe_local.offload.dense.index_pieces import use_index_pieces
from moe_local.offload.dense.latent_attention import use_latent_attention
from moe_local.offload.dense.linear import use_native_linears
from moe_local.offload.dense.mamba2 import use_native_mamba2
from moe_local.offload.dense.norm import use_native_norms
from moe_local.offload.dense.router import use_native_routers
from moe_local.offload.dense.sink_attention import use_sink_attention
from moe_local.offload.dense.state_pieces import use_state_pieces
from moe_local.offload.dense.token_delta_net import use_token_delta_nets
from moe_local.offload.dense.token_layer import use_token_layers
from moe_local.offload.dense.token_mamba2 import use_token_mamba2
from moe_local.offload.dense.token_mlp import use_token_mlps
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.gpu.card_moves import move_between_cards
from moe_local.offload.modeling.undecorated import decorate
from moe_local.offload.quantize.bnb import bitsandbytes_ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


_loading = threading.Lock()
"""Held while a model loads: transformers' loader sets torch's default dtype for all threads, and
`_quiet_loading` sets transformers' verbosity."""


def load_skeleton(
    folder: Path,
    config: Any,
    *,
    dense: str,
    dtype: torch.dtype,
    device: torch.device,
    activations: str = "native",
    device_map: Mapping[str, str] | None = None,
    weights: DenseWeights | None = None,
) -> Any:
    """The transformers model in `folder` with every experts module replaced by an OffloadedExperts.

    `dense` is "nf4" or "int8", which quantizes weights while they are loaded and computes in `dtype`, or any
    other name, which loads weights in `dtype`. `ModelSpec.quantized` says which weights are quantized: on
    CUDA by bitsandbytes, on the CPU as QuantizedLinear with these `activations`. `weights` are read instead
    of the folder's safetensors files where transformers would need a GPU to read those. Tensors of routed
    experts are not read, and no parameter requires gradients. Everything goes to `device`, or where
    accelerate's `device_map` (module path -> device) says, with CardMoves that move hidden states between
    cards. Loads one model at a time; other threads wait. Raises CheckpointError if weights are missing or
    cannot be quantized, or if there are no experts modules to replace.
    """
    if device.type == "cpu":
        logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_of_use)
    cls = model_class(config)
    swapping = _swapping(cls, weights)
    config = _unquantized(config)
    quantization = None
    if dense in ("nf4", "int8"):
        on_cpu = device.type == "cpu"
        model = meta_model(config)
        quantization = _ours(model, dense, activations) if on_cpu else _bitsandbytes(model, dense, dtype)
    with _loading, _quiet_loading(), _told_by(weights):
        model, info = swapping.from_pretrained(
            None if weights is not None and weights.complete else folder,
            state_dict=weights.state_dict() if weights is not None and weights.complete else None,
            config=class_config(config),
            dtype=dtype,
            device_map={"": str(device)} if device_map is None else dict(device_map),
            quantization_config=quantization,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
    model.__class__ = cls
    quantizer = model.hf_quantizer if quantization is not None and device.type == "cpu" else None
    _check_loaded(model, folder, info, quantizer)
    if device_map is not None and len(set(device_map.values())) > 1:
        move_between_cards(model, device_map)
    if dense == "int8":
        _flatten_inputs(model)
    if device.type == "cpu":
        _take_into_memory(model)
    model.eval().requires_grad_(False)
    _use_faster_ways(model, device)
    return model


def _check_loaded(model: Any, folder: Path, info: Mapping[str, Any], quantizer: Any) -> None:
    """Raise CheckpointError unless all weights were there and could be quantized, and there are experts.

    `info` is what transformers' loader tells; `quantizer`: ours, or None if it had nothing to do."""
    if not any(isinstance(module, OffloadedExperts) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__} has no routed experts to offload; "
            "moe-local runs Mixture-of-Experts models"
        )
    mismatched = set(info["mismatched_keys"]) | set(() if quantizer is None else quantizer.mismatched)
    if mismatched:
        name, stored, wanted = min(mismatched)
        raise CheckpointError(
            f"{folder} holds {name} as {list(stored)} where its config.json says {list(wanted)}, "
            "and config and weights do not match; download it again"
        )
    if quantizer is not None and quantizer.refused:
        raise quantizer.refused[0]
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that {type(model).__name__} needs, such as {missing[0]}; "
            "download it again"
        )


def _use_faster_ways(model: Any, device: torch.device) -> None:
    """Let parts of the model be computed in faster ways, where trials find that these give the same. Whole
    layers come last: theirs are made of the ways of their parts."""
    use_single_query_attention(model)
    use_sink_attention(model)
    use_latent_attention(model)
    use_index_pieces(model)
    if device.type == "cpu":
        use_native_delta_rule(model)
        use_native_mamba2(model)
    use_state_pieces(model)
    if device.type == "cpu":
        use_native_linears(model)
        use_native_norms(model)
        use_native_gated_norms(model)
        use_native_routers(model)
        use_token_attention(model)
        use_token_delta_nets(model)
        use_token_mamba2(model)
        use_token_mlps(model)
        use_token_layers(model)
    elif device.type == "cuda":
        use_fused_norms(model)


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for transformers' advice to install kernels, which do not exist for CPUs."""
    return "falling back to its reference" not in record.getMessage()


def _unquantized(config: Any) -> Any:
    """A copy of the config that does not say how the checkpoint's weights were quantized."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


@contextlib.contextmanager
def _told_by(weights: DenseWeights | None) -> Iterator[None]:
    """Raise an error of `weights` itself instead of the one with which the loader replaces it."""
    try:
        yield
    except Exception as error:
        if weights is None or not weights.failures:
            raise
        raise weights.failures[0] from error
    if weights is not None and weights.failures:
        raise weights.failures[0]


def replace_experts(model: Any) -> list[Any]:
    """Replace a model's modules of routed experts with OffloadedExperts; returns the modules, by layer."""
    found = list(experts_modules(model))
    for index, (name, module) in enumerate(found):
        model.set_submodule(name, OffloadedExperts(module, index))
    return [module for _, module in found]


def _swapping(cls: type[Any], weights: DenseWeights | None = None) -> type[Any]:
    """A subclass of `cls` whose `from_pretrained` replaces experts modules just before it reads weights.

    It overrides `_load_pretrained_model`, which is private, but the only method that runs after the model and
    its quantizer have been set up and before anything is allocated (transformers 5.17 to 5.23). Otherwise it
    passes for `cls`, whose name it has; `cls` itself is not changed, since other code may be using it.
    `weights`, if given, are read instead of the checkpoint's files.
    """

    def load(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        decorate(model)
        replace_experts(model)
        ignored = model._keys_to_ignore_on_load_unexpected
        # The file has experts' weights and the model has no place for them any more, as intended.
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), r"(^|\.)experts\.", r"block_sparse_moe"}
        try:
            state_dict = state_dict if weights is None else weights.state_dict()
            return cls._load_pretrained_model(model, state_dict, *args, **kwargs)
        finally:
            model._keys_to_ignore_on_load_unexpected = ignored

    body = {
        "_load_pretrained_model": staticmethod(load),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), body)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Disable transformers' own progress bar and load report, since the caller shows progress."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _take_into_memory(model: nn.Module) -> None:
    """Copy weights that are still views of the mapped checkpoint file into memory: otherwise their first use
    would read them from disk page by page, for milliseconds at a time that appear in no statistics."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _flatten_inputs(model: nn.Module) -> None:
    """Flatten inputs of int8 layers to two dimensions if they have more than three.

    bitsandbytes 0.50 itself flattens three dimensions to rows, but with four, as in latent attention, it
    takes the scales over the wrong dimension.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = functools.partial(_by_rows, module.forward)


def _by_rows(linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.dim() > 3 else linear(x)


def _ours(model: Any, dense: str, activations: str) -> Any:
    """The config with which transformers loads the quantizable weights of `model` as QuantizedLinear.

    `model` is on the meta device.
    """
    from moe_local.offload.checkpoint.dense_quantizer import DenseConfig

    return DenseConfig(quantized_weights(model, cuda=False), dense, activations)


def _bitsandbytes(model: Any, dense: str, dtype: torch.dtype) -> Any:
    """The same config for bitsandbytes, with all other layers skipped, some of which it would quantize."""
    from transformers import BitsAndBytesConfig

    bitsandbytes_ops()  # imports it before transformers does: silently and without network access
    # Otherwise it logs a line in every int8 product whose input is not fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    quantizable = {name.removesuffix(".weight") for name in quantized_weights(model, cuda=True)}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    skipped = [re.escape(name) for name in linear if name not in quantizable]
    if dense == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )
