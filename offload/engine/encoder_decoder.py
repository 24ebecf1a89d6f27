"""An adapter that lets the engine drive encoder-decoder models as if they continued their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from moe_local.offload.engine.own_caches import OwnCaches, held_bytes


@dataclass(slots=True)
class Translation:
    """One sequence's memory: the encoder's output for its prompt, and the decoder's cache."""

    cache: Any
    encoded: Any = None

    @classmethod
    def fresh(cls) -> Translation:
        return cls(EncoderDecoderCache(DynamicCache(), DynamicCache()))


class EncoderDecoder:
    """A transformers encoder-decoder called like a causal language model; other attributes are the model's.

    The first forward of a sequence gets its whole prompt, which the encoder reads, and returns the logits
    after the decoder's start token; each later forward gets one token that the decoder has generated.
    Processors that look back (repetition penalties) see the prompt as well, whereas transformers' generate
    shows them only the decoder's tokens.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Translation,
        use_cache: bool = True,
    ) -> Any:
        """input_ids [1, n]: all of the prompt, or one token. The logits are [1, 1, vocabulary]."""
        if past_key_values.encoded is None:
            past_key_values.encoded = self._hf.get_encoder()(input_ids=input_ids)
            input_ids = torch.full_like(input_ids[:, :1], self._start())
        return self._hf(
            encoder_outputs=past_key_values.encoded,
            decoder_input_ids=input_ids,
            past_key_values=past_key_values.cache,
            use_cache=use_cache,
        )

    def _start(self) -> int:
        for config in (self._hf.generation_config, self._hf.config):
            if (start := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(start)
        return int(self._hf.config.pad_token_id or 0)


class Translations(OwnCaches):
    """One Translation per sequence. A failed forward drops it, and it is computed again from the prompt."""

    def __init__(self, config: Any, rows: int, capacity: int) -> None:
        super().__init__(config, rows, capacity)
        self.whole_prompt_only = True
        self._prompts: list[int] = []

    def _fresh(self) -> Translation:
        return Translation.fresh()

    def join(self) -> int:
        self._prompts.append(0)
        return super().join()

    def leave(self, row: int) -> None:
        prompt = self._prompts.pop()
        if row < len(self._prompts):
            self._prompts[row] = prompt
        super().leave(row)

    def swap(self, one: int, other: int) -> None:
        self._prompts[one], self._prompts[other] = self._prompts[other], self._prompts[one]
        super().swap(one, other)

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        """The prompt at once, then token by token: an expert with a capacity limit (Switch Transformers)
        drops tokens when several come in one forward."""
        if self.lens[row]:
            return 1
        self._prompts[row] = self._prompts[row] or todo
        return self._prompts[row]

    def shorten(self, row: int, length: int) -> None:
        super().shorten(row, length)
        self._prompts[row] = 0

    @property
    def nbytes(self) -> int:
        total = 0
        for kept in self._caches:
            total += held_bytes(kept.cache.self_attention_cache) + held_bytes(
                kept.cache.cross_attention_cache
            )
            total += 0 if kept.encoded is None else kept.encoded.last_hidden_state.nbytes
        return total

    def check_integrity(self) -> None:
        super().check_integrity()
        assert len(self._prompts) == len(self.lens)


def as_decoder(hf: Any) -> Any:
    """`hf` itself, or the adapter for it if it is an encoder-decoder."""
    return EncoderDecoder(hf) if getattr(hf.config, "is_encoder_decoder", False) else hf
