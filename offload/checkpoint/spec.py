"""What a checkpoint's config says about the model, without any weight: layers, experts, sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_local.cache.errors import CheckpointError, first_line
from moe_local.offload.checkpoint.quantization import Quantization
from moe_local.offload.dense.state_pieces import kept_numel
from moe_local.offload.modeling.class_source import class_source
from moe_local.offload.modeling.undecorated import decorate, is_experts_module
from moe_local.offload.quantize.layout import TensorSpec
from moe_local.offload.quantize.stored import StoredFormat
from moe_local.offload.system.collector import uncollected

WITHOUT_TOWERS = frozenset({"gemma4"})
"""Model types whose class accepts None as the config of its vision and audio towers."""


NOT_SERVED = {
    "minimax": "whose class wants a cache of its own",
    "ernie4_5_vl_moe": "whose experts for text and for images are numbered together",
}
"""Model types that transformers has and that are refused, and why."""


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One routed-experts module. `name` is its path in the model; `index` counts MoE layers from 0."""

    index: int
    name: str
    num_experts: int
    top_k: int
    tensors: tuple[TensorSpec, ...]
    transposed: bool
    """Whether the model keeps matrices as [in, out]; `tensors` are [out, in] all the same."""

    @property
    def expert_numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def decoder_layer(self) -> int:
        """The decoder layer that it is part of; in a model without numbered layers the MoE layer's index."""
        number = layer_number(self.name)
        return self.index if number is None else number


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model: E experts in each MoE layer, K of them per token, D hidden width."""

    model_type: str
    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_context: int
    dtype: torch.dtype
    """The checkpoint's own dtype."""
    stored: StoredFormat
    """The format in which the checkpoint stores its experts, according to the config."""
    layers: tuple[MoELayer, ...]
    dense: tuple[TensorSpec, ...]
    """Every parameter outside the routed experts; tied parameters are listed once."""
    kv_numel_per_token: int
    """Numbers kept per token of context over all layers, keys and values together."""
    state_numel: int
    """Numbers that layers keep for a sequence whatever its length: recurrent and convolution states."""
    expanded_kv_numel_per_token: int
    """Numbers per token of one layer's keys and values once they are repeated for, or projected to, every
    head, as attention reads them."""
    quantizable: frozenset[str]
    """The `dense` weights that dense="nf4" and "int8" quantize on CUDA (see `quantized_weights`)."""
    quantizable_on_cpu: frozenset[str]
    """The same on the CPU."""

    def quantized(self, dense: str, *, cuda: bool) -> frozenset[str]:
        """The weights that are loaded quantized with option `dense`; none for "bf16" and the like."""
        if dense not in ("nf4", "int8"):
            return frozenset()
        return self.quantizable if cuda else self.quantizable_on_cpu

    @property
    def top_k(self) -> int:
        return max(layer.top_k for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Experts of the widest MoE layer."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def expert_numel(self) -> int:
        """Weights in all routed experts."""
        return sum(layer.num_experts * layer.expert_numel for layer in self.layers)

    @property
    def dense_numel(self) -> int:
        return sum(tensor.numel for tensor in self.dense)

    @property
    def total_numel(self) -> int:
        return self.expert_numel + self.dense_numel

    @property
    def active_numel(self) -> int:
        """Weights that one token uses."""
        return self.dense_numel + sum(layer.top_k * layer.expert_numel for layer in self.layers)


def layer_number(name: str) -> int | None:
    """The decoder layer of a parameter or module by its path, such as model.layers.3.mlp.gate."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every routed-experts module, in forward order."""
    return ((name, module) for name, module in model.named_modules() if is_experts_module(module))


@uncollected()  # as it imports the class
def model_class(config: Any) -> type[Any]:
    """Transformers' class that generates text for this config: a causal language model if there is one, else
    an image-text or encoder-decoder model. Raises CheckpointError for other kinds of models."""
    from transformers.models.auto import modeling_auto as auto

    if config.model_type in NOT_SERVED:
        raise CheckpointError(
            f"models of type {config.model_type!r}, {NOT_SERVED[config.model_type]}, are not supported"
        )
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ):
        if type(config) in mapping:
            return cast("type[Any]", mapping[type(config)])
    raise CheckpointError(
        f"model type {config.model_type!r} is not a language model that transformers knows; "
        "a newer transformers may know it: pip install -U transformers"
    )


def class_config(config: Any) -> Any:
    """The config to construct `model_class` with; for a multimodal checkpoint, that of its text model.

    If the class needs the whole config, its vision and audio towers are left out if it can do without them,
    as Gemma 4 can. The towers of other classes are loaded and stay unused.
    """
    cls = model_class(config)
    kind = config.sub_configs.get("text_config")
    if kind is not None and getattr(cls, "config_class", None) is kind:
        return config.get_text_config(decoder=True)
    if config.model_type in WITHOUT_TOWERS:
        config = copy.deepcopy(config)
        config.vision_config = config.audio_config = None
    return config


class _Unfilled(TorchFunctionMode):
    """Disables the functions of torch.nn.init: on the meta device they fill nothing, but take a quarter of
    the time that building a model takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def meta_model(config: Any) -> Any:
    """The model with all its parameters on the meta device: shapes and names, no memory.

    Raises CheckpointError if transformers cannot build it: sizes that contradict each other, for example.
    """
    kind = model_class(config)
    try:
        with torch.device("meta"), _Unfilled():
            model = kind._from_config(class_config(config))
    except Exception as error:  # sizes that contradict each other meet asserts, divisions and more
        raise CheckpointError(
            f"transformers cannot build {kind.__name__} from the config: {first_line(error)}"
        ) from error
    decorate(model)
    return model


def model_spec(config: Any, model: Any = None) -> ModelSpec:
    """Read a transformers config (and optionally its `meta_model`, to save building it again).

    Raises CheckpointError if the model has no routed experts that transformers' experts interface serves.
    """
    model = meta_model(config) if model is None else model
    text = config.get_text_config(decoder=True)
    layers: list[MoELayer] = []
    expert_names = set()
    for name, module in experts_modules(model):
        transposed = bool(getattr(module, "is_transposed", False))
        tensors = []
        for parameter_name, parameter in module.named_parameters(recurse=False):
            expert_names.add(f"{name}.{parameter_name}")
            shape = tuple(parameter.shape[1:])
            matrix = transposed and len(shape) == 2
            tensors.append(TensorSpec(parameter_name, shape[::-1] if matrix else shape))
        num_experts = next(iter(module.parameters(recurse=False))).shape[0]
        layers.append(
            MoELayer(len(layers), name, num_experts, _top_k(text, name, module), tuple(tensors), transposed)
        )
    if not layers:
        raise CheckpointError(
            f"{type(model).__name__} (model type {config.model_type!r}) has no routed experts to offload; "
            "moe-local runs Mixture-of-Experts models only"
        )
    dense = tuple(
        TensorSpec(name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in expert_names
    )
    return ModelSpec(
        model_type=config.model_type,
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        max_context=int(getattr(text, "max_position_embeddings", 0) or 32768),
        dtype=_dtype(config),
        stored=_stored(config),
        layers=tuple(layers),
        dense=dense,
        kv_numel_per_token=_kv_numel_per_token(text, model),
        state_numel=kept_numel(model),
        expanded_kv_numel_per_token=_expanded_kv_numel_per_token(text),
        quantizable=frozenset(quantized_weights(model, cuda=True)),
        quantizable_on_cpu=frozenset(quantized_weights(model, cuda=False)),
    )


def _top_k(text: Any, name: str, module: nn.Module) -> int:
    """Of the experts `module`, whose path is `name`. Hunyuan's config may have a number for each layer."""
    for field in ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"):
        value = getattr(text, field, None)
        layer = layer_number(name)
        if isinstance(value, list) and layer is not None and layer < len(value):
            value = value[layer]
        if isinstance(value, int):
            return value
    if isinstance(value := getattr(module, "top_k", None), int):
        return value
    raise CheckpointError(
        f"the config of model type {text.model_type!r} does not say how many experts a token uses"
    )


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _stored(config: Any) -> StoredFormat:
    dtype = str(_dtype(config)).removeprefix("torch.")
    quantization = Quantization.of(config)
    if quantization is None:
        return StoredFormat({"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32"), dtype)
    return StoredFormat(quantization.experts, dtype, quantization.block)


WITHOUT_KEYS = ("linear", "mamba", "conv", "moe", "mlp")
"""In a config's names of the types of layers: those that keep no keys and values of tokens."""


def _kv_numel_per_token(text: Any, model: nn.Module) -> int:
    """How many numbers all layers cache per token: with MLA a latent, a rope key and, with an indexer, its
    key; with other attention 2 x heads x width."""
    types = getattr(text, "layer_types", None)
    layers = [
        layer
        for index, layer in enumerate(_layer_configs(text))
        if not types or not any(kind in types[index] for kind in WITHOUT_KEYS)
    ]
    if all(getattr(layer, "kv_lora_rank", None) for layer in layers):
        kinds: set[Any] = {type(module) for module in model.modules() if hasattr(module, "kv_lora_rank")}
        # these cache expanded keys and values, as DeepSeek V3.2 and GLM-5 in transformers 5.17
        expanded = any(".update(key_states, value_states" in class_source(kind) for kind in kinds)
        return sum(
            (_expanded_latents(layer) if expanded else int(layer.kv_lora_rank + layer.qk_rope_head_dim))
            + int(getattr(layer, "index_head_dim", None) or 0)
            for layer in layers
        )
    return sum(2 * heads * width for heads, width in map(_heads, layers))


def _expanded_kv_numel_per_token(text: Any) -> int:
    """How many numbers attention reads per token of a layer: MLA projects latents to keys and values of each
    head; other attention repeats keys and values for each query head."""
    configs = _layer_configs(text)
    if all(getattr(layer, "kv_lora_rank", None) for layer in configs):
        return max(map(_expanded_latents, configs))
    heads = max(int(layer.num_attention_heads) for layer in configs)
    return 2 * heads * max(_heads(layer)[1] for layer in configs)


def _expanded_latents(layer: Any) -> int:
    width = layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim
    return int(layer.num_attention_heads * width)


def _layer_configs(text: Any) -> list[Any]:
    """The config of each layer; mostly the same one."""
    if getattr(text, "is_heterogeneous", False):
        return [text.per_layer_config[index] for index in range(text.num_hidden_layers)]
    return [text] * text.num_hidden_layers


def _heads(layer: Any) -> tuple[int, int]:
    """(number of key heads, width of a head), by a layer's config; they differ between the layers of Gemma
    4."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return int(heads), int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def quantized_weights(model: Any, *, cuda: bool) -> Iterator[str]:
    """Names of the weights that dense="nf4" and "int8" quantize; `model` may be on the meta device.

    On CUDA these are the weights that transformers' bitsandbytes integration would quantize (of nn.Linear
    itself, but not the output head or tied weights), without routers (a rounded router sends tokens to other
    experts) and without matrices that are not whole blocks of 32 rows by 64 columns, which not all of
    bitsandbytes' kernels accept. On the CPU, where each token waits until the output head's bytes are read,
    the head is quantized as well.
    """
    head = model.get_output_embeddings()
    routers = {"gate", "router", "shared_expert_gate"}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or routers & set(name.split(".")):
            continue
        if _is_asked_for_its_dtype(model, name):
            continue
        if module is head and (cuda or _is_tied(model, module.weight)):
            continue
        if module.in_features % 64 == 0 and module.out_features % 32 == 0:
            yield f"{name}.weight"


def _is_asked_for_its_dtype(model: nn.Module, name: str) -> bool:
    """Whether the module around a linear layer converts something to the dtype of its weight, which for a
    quantized weight is an integer. Indexers like DeepSeek V3.2's do, and T5's and Switch's feed-forwards."""
    parent, _, child = name.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return f"self.{child}.weight.dtype" in class_source(kind)


def _is_tied(model: nn.Module, weight: torch.Tensor) -> bool:
    named = model.named_parameters(remove_duplicate=False)
    return sum(parameter is weight for _, parameter in named) > 1
