"""transformers' generate on top of the engine: tensors of prompts in, the same tensor out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from typing import Any

import torch

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.sampling import (
    Settings,
    generation_config,
    input_device,
    make_settings,
    needs_hf_generate,
    option_error,
    with_default_length,
    without_shaping,
)
from moe_local.offload.engine.sequence import Sequence
from moe_local.offload.gpu.relief import shortage
from moe_local.offload.ranges import check_range, nth_seed
from moe_local.offload.system import interrupt


def generate_ids(
    engine: Engine,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    logprobs: int | None = None,
    **options: Any,
) -> Any:
    """Like transformers' generate: ids [B, n] -> [B * num_return_sequences, n + new], padded after the end.

    Without a mask, one is derived from the pad token as in transformers. Row i of the result is sampled with
    the i-th seed from `seed` on; without a seed, with torch's global generator. What the engine does not
    support, including masks with holes and padding on the right, transformers' own generate does with the
    same model, and its result is returned as it is. Raises OptionError, also for any `logprobs`, which a
    tensor has no place for; MoeLocalError while other sequences are in the engine.
    """
    if logprobs is not None:
        raise OptionError(
            "logprobs cannot be given with a tensor of ids; give one prompt as a list: "
            "model.generate(ids[0].tolist(), logprobs=...)"
        )
    hf = engine.hf
    _check_tensors(input_ids, attention_mask)
    engine.check_ids(input_ids.flatten().tolist())
    check_range("seed", seed)
    if needs_hf_generate(hf, options) or hf.config.is_encoder_decoder:  # its result has no prompt in it
        return _hand_over(engine, input_ids, attention_mask, tokenizer, seed, options)
    width, masked = input_ids.shape[1], attention_mask is not None
    config = generation_config(hf, options, width=width, rows=len(input_ids), masked=masked)
    if attention_mask is None:
        attention_mask = hf._prepare_attention_mask_for_generation(input_ids.to(input_device(hf)), config, {})
    paddings = _left_padding(attention_mask)
    if paddings is None or (config.stop_strings is not None and config._eos_token_tensor is None):
        return _hand_over(engine, input_ids, attention_mask, tokenizer, seed, options)
    copies = config.num_return_sequences or 1
    prompts = [
        row[pad:] for row, pad in zip(input_ids.tolist(), paddings, strict=True) for _ in range(copies)
    ]
    settings = [
        make_settings(
            hf,
            prompt,
            tokenizer=tokenizer,
            seed=None if seed is None else nth_seed(seed, index),
            padding=width - len(prompt),
            stops_in_prompt=True,
            **options,
        )
        for index, prompt in enumerate(prompts)
    ]
    news = run_all(engine, prompts, settings)
    return _assemble(input_ids.repeat_interleave(copies, dim=0), news, settings[0].pad_id or 0)


def _check_tensors(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    kind = input_ids.dtype
    integers = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
    if input_ids.dim() != 2 or not integers or not input_ids.numel():
        raise OptionError(
            f"input ids are {kind} of shape {list(input_ids.shape)}; "
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
    engine: Engine,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    tokenizer: Any,
    seed: int | None,
    options: Mapping[str, Any],
) -> Any:
    """Call transformers' own generate. Here, too, Ctrl-C takes effect only at safe points.

    If VRAM runs out on the way, the call fails, since it cannot be resumed in the middle; but experts are
    evicted to free memory, so that a second call may succeed.
    """
    options = without_shaping(options)
    hf = engine.hf
    device = input_device(hf)
    devices = [device] if device.type == "cuda" else []
    lacking = None
    with interrupt.deferred(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            result = hf.generate(
                input_ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                tokenizer=tokenizer,
                **with_default_length(hf, options),
            )
        except ValueError as error:
            raise option_error(error) from error
        except RuntimeError as error:
            lacking = shortage(error)
            if lacking is None:
                raise
    if lacking is not None:
        given = engine.relief is not None and engine.relief(lacking)
        remedy = "some experts have given way: call it again" if given else "use fewer or shorter sequences"
        raise MoeLocalError(f"VRAM ran out in transformers' own generate; {remedy}")
    return result.to(input_ids.device) if isinstance(result, torch.Tensor) else result


def run_all(engine: Engine, prompts: Ids[Ids[int]], settings: Ids[Settings]) -> list[list[int]]:
    """The new tokens of every prompt; as many prompts run at a time as the engine has rows. The engine has no
    active sequence afterwards.

    Raises OptionError as `check_prompt`, before anything is computed.
    """
    if engine.active:
        raise MoeLocalError(
            f"{len(engine.active)} sequences are being generated; finish or close their streams first"
        )
    for prompt, setting in zip(prompts, settings, strict=True):
        engine.check_prompt(prompt, setting)
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
