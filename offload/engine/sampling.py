"""Settings of how a sequence picks its tokens and when it ends, made with transformers' own methods.

Options come from the checkpoint's generation_config and from keyword arguments, with transformers' names and
meanings; `batch.generate_ids` takes them for tensors of prompts.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ids
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from moe_local.cache.errors import OptionError, shown
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.engine.grammar import GrammarMask
from moe_local.offload.engine.penalties import Penalties, check_bias
from moe_local.offload.engine.stops import AnswerStops, Stops, TensorStops, stop_strings
from moe_local.offload.forms import json_grammar, lark_grammar, led_grammar
from moe_local.offload.gpu.capturing import alone
from moe_local.offload.ranges import RANGES, check_range

DEFAULTS = GenerationConfig()
DEFAULT_MAX_NEW_TOKENS = 512
LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest token is taken, as with 0: it is what would be drawn, but scores divided by so small
a number may overflow."""
LIMITS = frozenset({"max_new_tokens", "max_length"})
SAMPLING_OPTIONS = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})
FLOAT_OPTIONS = SAMPLING_OPTIONS - {"top_k"} | {"repetition_penalty", "encoder_repetition_penalty"}
FORMS = frozenset({"json_schema", "grammar"})
SHAPING = frozenset({"frequency_penalty", "presence_penalty", "logit_bias"}) | FORMS
"""Options that the engine supports and transformers' generate does not."""
OWN_OPTIONS = frozenset({"seed", "tokenizer", "generation_config", "attention_mask", "logprobs"}) | SHAPING
BEYOND_OUR_LOOP = frozenset(
    {"token_healing", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"}
    | {"output_hidden_states", "is_assistant", "low_memory"}
)
TOKEN_OPTIONS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
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
    stops: Stops | None
    """None when no stop string is given."""
    generator: torch.Generator | None
    """On the model's device. None: torch's global one."""
    max_time: float | None
    """Seconds."""
    logprobs: int | None = None
    """How many of the likeliest tokens are returned with each token and its log probability; None: no log
    probabilities."""
    prompt_logprobs: bool = False
    """Whether the prompt's own tokens get log probabilities, too."""


def draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A token drawn from probabilities [1, vocabulary]: int64 [], without a host sync; NaN counts as 1.

    `generator`: on the same device; None: torch's global one.
    """
    # multinomial on NaN would kill the CUDA context before the NaN could be reported
    probabilities = probabilities.masked_fill(probabilities.isnan(), 1.0)
    with alone if generator is None else nullcontext():
        return torch.multinomial(probabilities, num_samples=1, generator=generator)[0, 0]


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
        if name in RANGES:
            check_range(name, options[name])
        if name in TOKEN_OPTIONS:
            _check_tokens(name, options[name])


def _check_tokens(name: str, value: Any) -> None:
    """Raises OptionError for what is no token id, nor several. Those beyond the vocabulary are allowed, as in
    transformers, where -1 for eos_token_id means that nothing ends an answer."""
    listed = value if isinstance(value, list | tuple) else [value]
    if value is None or isinstance(value, torch.Tensor):
        return
    if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in listed):
        raise OptionError(f"{name} is {shown(value)}; it must be a token id, or a list of them")


def imply_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as users mean them: a temperature or top_p turns sampling on, a temperature of about 0 off.

    transformers ignores temperature and similar options unless do_sample is set; this sets it if absent.
    """
    implied = dict(options)
    if _is_greedy(implied.get("temperature")) and not implied.get("do_sample"):
        return {name: value for name, value in implied.items() if name not in SAMPLING_OPTIONS} | {
            "do_sample": False
        }
    if implied.get("do_sample") is None and any(implied.get(name) is not None for name in SAMPLING_OPTIONS):
        implied["do_sample"] = True
    return implied


def _is_greedy(temperature: Any) -> bool:
    return isinstance(temperature, int | float) and 0 <= temperature < LEAST_TEMPERATURE


def with_default_length(hf: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with DEFAULT_MAX_NEW_TOKENS where neither they nor the checkpoint limit the length.

    A limit of None counts as not given; transformers would use its own default of 20.
    """
    options = {name: value for name, value in options.items() if value is not None or name not in LIMITS}
    if any(_given(hf, options, name) for name in LIMITS):
        return options
    return {**options, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS}


def _given(hf: Any, options: Mapping[str, Any], name: str) -> bool:
    configs = (options.get("generation_config"), hf.generation_config)
    return options.get(name) is not None or any(getattr(config, name, None) is not None for config in configs)


def generation_config(hf: Any, options: Mapping[str, Any], *, width: int, rows: int, masked: bool) -> Any:
    """The GenerationConfig of a call for `rows` prompts of `width` tokens, lengths and special tokens set.

    `masked`: whether the caller gave an attention mask. Raises OptionError for values not allowed.
    """
    options = with_default_length(hf, options)
    kwargs = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    kwargs |= {
        name: float(kwargs[name]) for name in FLOAT_OPTIONS & kwargs.keys() if type(kwargs[name]) is int
    }
    no_max, no_min = not _given(hf, options, "max_length"), not _given(hf, options, "min_length")
    with _as_option_error():
        config, _ = hf._prepare_generation_config(options.get("generation_config"), **kwargs)
        hf._prepare_special_tokens(config, masked, device=input_device(hf), batch_size=rows)
        prompt = torch.empty((1, width), dtype=torch.long)
        return hf._prepare_generated_length(config, no_max, no_min, "input_ids", width, prompt)


@contextmanager
def _as_option_error() -> Iterator[None]:
    """Turn transformers' errors about values into OptionErrors; values that it does not check may raise any
    of the types below."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise option_error(error) from error


def option_error(error: Exception) -> OptionError:
    """The same message as an OptionError of one line."""
    return error if isinstance(error, OptionError) else OptionError(" ".join(str(error).split()))


def input_device(hf: Any) -> torch.device:
    """The device on which the model takes its input ids."""
    device: torch.device = hf.get_input_embeddings().weight.device
    return device


def make_settings(
    hf: Any,
    prompt_ids: Ids[int],
    answers: AnswerFormat | None = None,
    /,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    padding: int = 0,
    logprobs: int | None = None,
    stops_in_prompt: bool = False,
    **options: Any,
) -> Settings:
    """Settings of one sequence. `padding`: padding tokens before it in a batch, which count for max_length.

    `tokenizer` is needed for stop_strings, which with `stops_in_prompt` may begin in the prompt, as in
    transformers, and for json_schema and grammar. `answers`: how the model writes what comes before these;
    None: as the tokenizer's chat template says. Raises OptionError for unknown options and bad values.
    """
    check_options(hf, options)
    check_range("seed", seed)
    check_range("logprobs", logprobs)
    width = len(prompt_ids) + padding
    config = generation_config(hf, options, width=width, rows=1, masked=True)
    max_new_tokens = _check_length(config, width)
    if config.do_sample and config.temperature == 0:
        raise OptionError("temperature 0 cannot be sampled with; for greedy decoding set do_sample=False")
    config.do_sample = bool(config.do_sample) and not _is_greedy(config.temperature)
    config.max_length -= padding
    config.min_length = max(0, config.min_length - padding) if config.min_length else config.min_length
    device = input_device(hf)
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    with _as_option_error():
        processors = hf._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([list(prompt_ids)], device=device),
            device=device,
            model_kwargs={},
            logits_processor=LogitsProcessorList(),
        )
        _check_ids(config, processors, vocabulary_size(hf))
        # These come before processors such as top_p, which might otherwise keep only tokens that are masked.
        processors[:0] = _shaping(hf, prompt_ids, tokenizer, answers, config, options)
        return Settings(
            max_new_tokens=max_new_tokens,
            eos_ids=frozenset() if eos is None else frozenset(eos.tolist()),
            pad_id=None if pad is None else int(pad),
            do_sample=config.do_sample,
            processors=processors,
            stops=_stops(hf, config, tokenizer, in_prompt=stops_in_prompt),
            generator=None if seed is None else torch.Generator(device).manual_seed(seed),
            max_time=config.max_time,
            logprobs=logprobs,
        )


def _check_ids(config: Any, processors: Ids[Any], vocabulary: int) -> None:
    """Raises OptionError for ids beyond the vocabulary. Processors would first use them in a step."""
    eos = None if config.exponential_decay_length_penalty is None else config._eos_token_tensor
    given = {
        "forced_bos_token_id": config.forced_bos_token_id,
        "forced_eos_token_id": config.forced_eos_token_id,
        "eos_token_id": eos,
    }
    named = [
        (name, torch.as_tensor(ids).flatten().tolist()) for name, ids in given.items() if ids is not None
    ]
    for processor in processors:
        if isinstance(processor, SequenceBiasLogitsProcessor):
            words = isinstance(processor, NoBadWordsLogitsProcessor)
            ids = [token for tokens in processor.sequence_bias for token in tokens]
            named.append(("bad_words_ids" if words else "sequence_bias", ids))
    for name, ids in named:
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise OptionError(f"{name} has {token!r}; it must be token ids, from 0 to {vocabulary - 1}")


def vocabulary_size(hf: Any) -> int:
    """The number of logits of the model."""
    size: int = hf.config.get_text_config(decoder=True).vocab_size
    return size


def _shaping(
    hf: Any,
    prompt_ids: Ids[int],
    tokenizer: Any,
    answers: AnswerFormat | None,
    config: Any,
    options: Mapping[str, Any],
) -> list[Any]:
    """The processors for the options in SHAPING."""
    vocabulary = vocabulary_size(hf)
    shaping: list[Any] = []
    frequency, presence = (options.get(f"{name}_penalty") or 0 for name in ("frequency", "presence"))
    bias = check_bias(options.get("logit_bias") or {}, vocabulary)
    if frequency or presence or bias:
        shaping.append(Penalties(len(prompt_ids), frequency=frequency, presence=presence, bias=bias))
    if any(options.get(name) is not None for name in FORMS):
        grammar = form(options, prompt_ids, answers or answer_format(tokenizer))
        assert grammar is not None
        if config.min_length or config.min_new_tokens:
            raise OptionError("min_length cannot be combined with json_schema or grammar; leave one out")
        eos = config._eos_token_tensor
        ends = frozenset() if eos is None else frozenset(eos.tolist())
        shaping.append(GrammarMask(tokenizer, grammar, prompt_ids, vocabulary=vocabulary, ends=ends))
    return shaping


def form(options: Mapping[str, Any], prompt_ids: Ids[int], answers: AnswerFormat) -> str | None:
    """The form that `json_schema` or `grammar` demands of an answer to a prompt, and the model's way to
    answer of what comes before that, as llguidance's grammar; None: any."""
    schema, lark = options.get("json_schema"), options.get("grammar")
    if schema is None and lark is None:
        return None
    if schema is not None and lark is not None:
        raise OptionError("json_schema and grammar cannot be combined; leave one out")
    content = json_grammar(schema) if lark is None else lark_grammar(lark)
    if lark is not None and answers.thought_mark in lark.strip().partition("\n")[0]:
        return content  # it says itself what comes before
    lead = answers.leading(prompt_ids)
    return content if lead is None else led_grammar(lead, content)


def without_shaping(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for transformers' own generate. Raises OptionError if any of SHAPING is given."""
    if names := [name for name in options if name in SHAPING and options[name] is not None]:
        raise OptionError(
            f"{', '.join(names)} cannot be combined with beams, scores, padding on the right or anything "
            "else that only transformers' own generate does; leave one out"
        )
    return {name: value for name, value in options.items() if name not in SHAPING}


def _check_length(config: Any, width: int) -> int:
    """How many new tokens the limits allow after a prompt of `width` tokens."""
    count: int = config.max_length - width
    if count < 1:
        limit = "max_length" if config.max_new_tokens is None else "max_new_tokens"
        raise OptionError(
            f"{limit} {getattr(config, limit)} leaves no new token after {width} of prompt; raise it"
        )
    return count


def _stops(hf: Any, config: Any, tokenizer: Any, *, in_prompt: bool) -> Stops | None:
    """What ends a sequence by its text; lengths, time and end tokens are the engine's to check."""
    strings = None if config.stop_strings is None else stop_strings(config.stop_strings)
    if strings is None:
        return None
    return TensorStops(hf, config, tokenizer) if in_prompt else AnswerStops(tokenizer, strings)


def needs_hf_generate(hf: Any, options: Mapping[str, Any]) -> bool:
    """Whether the options need what the engine does not do: beams, assistants, guidance, scores, ..."""
    check_options(hf, options)
    if any(options.get(name) is not None for name in _generate_arguments(hf)):
        return True
    config = generation_config(hf, options, width=1, rows=1, masked=True)
    with _as_option_error():
        _check_ids(config, (), vocabulary_size(hf))  # beams would fail in a step, and on a GPU for good
    mode = config.get_generation_mode()
    return (
        mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        or config.guidance_scale not in (None, 1, 1.0)
        or config.use_cache is False
        or config.cache_implementation not in (None, "dynamic")
        or any(getattr(config, name, None) for name in BEYOND_OUR_LOOP)
    )


def refuse_beyond_loop(hf: Any, options: Mapping[str, Any]) -> None:
    """Raise OptionError for what only transformers' own generate can do, which takes ids."""
    names = [name for name in options if name in ("tokenizer", "attention_mask")]
    if options.get("num_return_sequences") not in (None, 1):
        names.append("num_return_sequences")
    if not names and needs_hf_generate(hf, options):
        names = [name for name in options if needs_hf_generate(hf, {name: options[name]})]
        names = names or ["generation_config"]
    if names:
        raise OptionError(
            f"{', '.join(names)} cannot be used with text and streams; for transformers' own generate "
            "give the prompt as a tensor: model.generate(torch.tensor([ids]), ...)"
        )
