"""How a sequence picks its tokens and when it ends, by the methods that transformers' own generate uses.

Options come from the checkpoint's generation_config and from keyword arguments, with transformers' names and
meanings. `generate_ids` is transformers' generate over our engine: same arguments in, same tensor out.
"""

from __future__ import annotations

import difflib
import inspect
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload import interrupt

if TYPE_CHECKING:
    from moe_local.offload.engine import Engine, Sequence

DEFAULTS = GenerationConfig()
DEFAULT_MAX_NEW_TOKENS = 512
SAMPLING_OPTIONS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})
FLOAT_OPTIONS = SAMPLING_OPTIONS - {"top_k"} | {"repetition_penalty", "encoder_repetition_penalty"}
OWN_OPTIONS = frozenset({"seed", "tokenizer", "generation_config", "attention_mask"})
BEYOND_OUR_LOOP = frozenset(
    {"token_healing", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"}
    | {"output_hidden_states", "is_assistant", "low_memory"}
)
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, inf),
    "top_k": (0, inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0, inf),
    "max_new_tokens": (1, inf),
    "max_length": (1, inf),
    "num_beams": (1, inf),
    "num_return_sequences": (1, inf),
}
"""Allowed values, ends included; transformers quietly ignores some that lie outside."""
REFUSED_OPTIONS = frozenset({"trust_remote_code", "inputs", "input_ids", "self", "kwargs"})


@dataclass(slots=True, eq=False)
class Settings:
    """Everything one sequence needs to pick a token and to end. Processors keep state: never share it."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    pad_id: int | None
    do_sample: bool
    processors: Any
    """A LogitsProcessorList; empty when there is nothing to change."""
    stop_strings: Any
    """A StoppingCriteriaList over the whole ids [1, length]; None when no stop string is given."""
    generator: torch.Generator | None
    """On the model's device. None: torch's global one."""
    max_time: float | None
    """Seconds."""


def option_names(hf: Any) -> set[str]:
    """Every keyword that generate understands for this model."""
    names = {name for config in (DEFAULTS, hf.generation_config) for name in vars(config)}
    names = {name for name in names if not name.startswith("_")} - {"transformers_version"}
    return names | OWN_OPTIONS | _generate_arguments(hf)


def _generate_arguments(hf: Any) -> set[str]:
    """Arguments that only transformers' own generate can honour: streamer, inputs_embeds, ..."""
    names = {*inspect.signature(hf.generate).parameters, *inspect.signature(hf.forward).parameters}
    return names - REFUSED_OPTIONS - OWN_OPTIONS - set(vars(DEFAULTS))


def check_options(hf: Any, options: Mapping[str, Any]) -> None:
    """Raises OptionError for a keyword that nothing understands, naming near ones, and for bad values."""
    known = option_names(hf)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "see transformers' GenerationConfig for all"
            )
            raise OptionError(f"unknown generation option {name!r}; {hint}")
        low, high = RANGES.get(name, (-inf, inf))
        value = options[name]
        if name in RANGES and value is not None and not (_is_number(value) and low <= value <= high):
            limit = f"from {low} to {high}" if high < inf else f"{low} or more"
            raise OptionError(f"{name} is {value!r}; it must be a number, {limit}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def imply_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as people mean them: a temperature or top_p asks for sampling, temperature 0 for greedy.

    transformers ignores temperature and its kin unless do_sample is set, which this sets where it is absent.
    """
    implied = dict(options)
    if implied.get("temperature") == 0 and not implied.get("do_sample"):
        return {name: value for name, value in implied.items() if name not in SAMPLING_OPTIONS} | {
            "do_sample": False
        }
    if implied.get("do_sample") is None and any(implied.get(name) is not None for name in SAMPLING_OPTIONS):
        implied["do_sample"] = True
    return implied


def _generation_config(hf: Any, options: Mapping[str, Any], *, width: int, rows: int, masked: bool) -> Any:
    """The GenerationConfig of a call, lengths and special tokens filled in, for prompts of `width` tokens."""
    base = options.get("generation_config")
    kwargs = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    kwargs |= {
        name: float(kwargs[name]) for name in FLOAT_OPTIONS & kwargs.keys() if type(kwargs[name]) is int
    }
    sources = [config for config in (base, hf.generation_config) if config is not None]

    def given(name: str) -> bool:
        return kwargs.get(name) is not None or any(getattr(config, name) is not None for config in sources)

    if not given("max_new_tokens") and not given("max_length"):
        kwargs["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
    config, _ = hf._prepare_generation_config(base, **kwargs)
    hf._prepare_special_tokens(config, masked, device=_device(hf), batch_size=rows)
    prompt = torch.empty((1, width), dtype=torch.long)
    no_max, no_min = not given("max_length"), not given("min_length")
    return hf._prepare_generated_length(config, no_max, no_min, "input_ids", width, prompt)


def _device(hf: Any) -> torch.device:
    device: torch.device = hf.get_input_embeddings().weight.device
    return device


def make_settings(
    hf: Any,
    prompt_ids: Ids[int],
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    padding: int = 0,
    **options: Any,
) -> Settings:
    """Settings of one sequence. `padding`: tokens that stood before it in a batch and count for max_length.

    `tokenizer` is needed for stop_strings only. Raises OptionError for unknown options and bad values.
    """
    check_options(hf, options)
    try:
        return _make_settings(hf, prompt_ids, tokenizer, seed, padding, options)
    except (ValueError, TypeError) as error:
        raise _option_error(error) from error


def _option_error(error: Exception) -> OptionError:
    return error if isinstance(error, OptionError) else OptionError(" ".join(str(error).split()))


def _make_settings(
    hf: Any, prompt_ids: Ids[int], tokenizer: Any, seed: int | None, padding: int, options: Mapping[str, Any]
) -> Settings:
    width = len(prompt_ids) + padding
    config = _generation_config(hf, options, width=width, rows=1, masked=True)
    max_new_tokens = config.max_length - width
    if max_new_tokens < 1:
        limit = "max_length" if config.max_new_tokens is None else "max_new_tokens"
        raise OptionError(
            f"{limit} {getattr(config, limit)} leaves no new token after {width} of prompt; raise it"
        )
    if config.do_sample and config.temperature == 0:
        raise OptionError("temperature 0 can not be sampled with; for greedy decoding set do_sample=False")
    config.max_length -= padding
    config.min_length = max(0, config.min_length - padding) if config.min_length else config.min_length
    device = _device(hf)
    eos = config._eos_token_tensor
    pad = config._pad_token_tensor
    return Settings(
        max_new_tokens=max_new_tokens,
        eos_ids=frozenset() if eos is None else frozenset(eos.tolist()),
        pad_id=None if pad is None else int(pad),
        do_sample=bool(config.do_sample),
        processors=hf._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([list(prompt_ids)], device=device),
            device=device,
            model_kwargs={},
            logits_processor=LogitsProcessorList(),
        ),
        stop_strings=_stop_strings(hf, config, tokenizer),
        generator=None if seed is None else torch.Generator(device).manual_seed(seed),
        max_time=config.max_time,
    )


def _stop_strings(hf: Any, config: Any, tokenizer: Any) -> Any:
    """Only the criteria on text; the engine itself checks lengths, time and end tokens, without a device."""
    if config.stop_strings is None:
        return None
    criteria = hf._get_stopping_criteria(config, StoppingCriteriaList(), tokenizer=tokenizer)
    return StoppingCriteriaList([item for item in criteria if isinstance(item, StopStringCriteria)])


def needs_hf_generate(hf: Any, options: Mapping[str, Any]) -> bool:
    """Whether the call asks for something our loop does not do: beams, assistants, guidance, scores, ..."""
    check_options(hf, options)
    if any(options.get(name) is not None for name in _generate_arguments(hf)):
        return True
    try:
        config = _generation_config(hf, options, width=1, rows=1, masked=True)
        mode = config.get_generation_mode()
    except (ValueError, TypeError) as error:
        raise _option_error(error) from error
    return (
        mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        or config.guidance_scale not in (None, 1, 1.0)
        or config.use_cache is False
        or config.cache_implementation not in (None, "dynamic")
        or any(getattr(config, name, None) for name in BEYOND_OUR_LOOP)
    )


def generate_ids(
    engine: Engine,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """transformers' generate: ids [B, n] in, [B * num_return_sequences, n + new] out, padded behind the end.

    Without a mask it is guessed from the pad token as transformers does. Row i of the result draws from a
    generator seeded with `seed + i`, without a seed from torch's global one. What our loop does not do, masks
    with holes or padding on the right included, transformers' own generate does over the same model; its
    result is returned as it is. Raises OptionError; MoeLocalError while other sequences are in the engine.
    """
    hf = engine.hf
    _check_tensors(input_ids, attention_mask)
    if needs_hf_generate(hf, options):
        return _hand_over(hf, input_ids, attention_mask, tokenizer, seed, options)
    width, masked = input_ids.shape[1], attention_mask is not None
    try:
        config = _generation_config(hf, options, width=width, rows=len(input_ids), masked=masked)
    except (ValueError, TypeError) as error:
        raise _option_error(error) from error
    if attention_mask is None:
        attention_mask = hf._prepare_attention_mask_for_generation(input_ids.to(_device(hf)), config, {})
    paddings = _left_padding(attention_mask)
    if paddings is None or (config.stop_strings is not None and config._eos_token_tensor is None):
        return _hand_over(hf, input_ids, attention_mask, tokenizer, seed, options)
    copies = config.num_return_sequences or 1
    prompts = [
        row[pad:] for row, pad in zip(input_ids.tolist(), paddings, strict=True) for _ in range(copies)
    ]
    settings = [
        make_settings(
            hf,
            prompt,
            tokenizer=tokenizer,
            seed=None if seed is None else seed + index,
            padding=width - len(prompt),
            **options,
        )
        for index, prompt in enumerate(prompts)
    ]
    news = run_all(engine, prompts, settings)
    return _assemble(input_ids.repeat_interleave(copies, dim=0), news, settings[0].pad_id or 0)


def _check_tensors(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise OptionError(
            f"input ids are {input_ids.dtype} of shape {list(input_ids.shape)}; "
            "they must be integers of shape [sequences, tokens], at least one of each"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise OptionError(
            f"attention_mask has shape {list(attention_mask.shape)}, the input ids {list(input_ids.shape)}; "
            "they must be the same"
        )


def _left_padding(mask: torch.Tensor) -> list[int] | None:
    """Masked tokens before each row, or None if a row is masked anywhere else or everywhere."""
    visible = mask != 0
    if not bool(visible[:, -1].all()) or bool((visible[:, :-1] & ~visible[:, 1:]).any()):
        return None
    paddings: list[int] = (~visible).sum(dim=1).tolist()
    return paddings


def _hand_over(
    hf: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    tokenizer: Any,
    seed: int | None,
    options: Any,
) -> Any:
    sources = [
        config for config in (options.get("generation_config"), hf.generation_config) if config is not None
    ]
    if not any(
        options.get(name) is not None or any(getattr(config, name) is not None for config in sources)
        for name in ("max_new_tokens", "max_length")
    ):
        options = {**options, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS}
    device = _device(hf)
    devices = [device] if device.type == "cuda" else []
    with interrupt.deferred(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return hf.generate(
                input_ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                tokenizer=tokenizer,
                **options,
            )
        except (ValueError, TypeError) as error:
            raise _option_error(error) from error


def run_all(engine: Engine, prompts: Ids[Ids[int]], settings: Ids[Settings]) -> list[list[int]]:
    """The new tokens of every prompt, as many at a time as the engine has rows. Leaves the engine empty."""
    if engine.active:
        raise MoeLocalError(
            f"{len(engine.active)} sequences are being generated; finish or close their streams first"
        )
    waiting = deque(enumerate(zip(prompts, settings, strict=True)))
    running: dict[Sequence, int] = {}
    news: list[list[int]] = [[] for _ in prompts]
    try:
        while waiting or running:
            while waiting and engine.free_rows:
                index, (prompt, setting) = waiting.popleft()
                running[engine.join(prompt, setting)] = index
            for step in engine.step():
                if step.finish_reason is not None:
                    news[running.pop(step.sequence)] = step.sequence.new_ids
                    engine.leave(step.sequence)
    finally:
        for sequence in running:
            engine.leave(sequence)
    return news


def _assemble(input_ids: torch.Tensor, news: list[list[int]], pad: int) -> torch.Tensor:
    length = max(len(new) for new in news)
    padded = torch.tensor([new + [pad] * (length - len(new)) for new in news], device=input_ids.device)
    return torch.cat([input_ids, padded.to(input_ids.dtype)], dim=1)
