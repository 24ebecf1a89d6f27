"""What a generation hands out: one record per token, one for the whole, both also the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_local.cache.stats import Stats

if TYPE_CHECKING:
    from moe_local.offload.engine.logprobs import LogProbs
    from moe_local.offload.engine.sequence import FinishReason, Step
    from moe_local.offload.engine.text import Detokenizer
    from moe_local.offload.store.leases import Tally


@dataclass(frozen=True, slots=True)
class Token:
    """One new token. Counts and times are of the step that made it; the first one's include the prompt."""

    text: str
    """What the token adds to the answer; empty while a character is incomplete, and without a tokenizer."""
    id: int
    ms: float
    """Wall time since the token before, or since the call."""
    stall_ms: float
    hits: int
    misses: int
    bytes_h2d: int
    bytes_disk: int
    finish_reason: FinishReason | None
    """None until the last token."""
    logprob: float | None = None
    """Natural logarithm of its probability in the model's own distribution, before temperature, penalties and
    the like: what the model thinks, not how it was sampled. None unless `logprobs` was given."""
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    """The likeliest ids there with theirs, best first, as many as `logprobs` says; None as above."""

    @classmethod
    def of(
        cls, step: Step, detokenizer: Detokenizer | None, seconds: float, before: Tally, after: Tally
    ) -> Token:
        """What a step has made for its sequence, whose `detokenizer` hears of it."""
        text = ""
        if detokenizer is not None:
            text = detokenizer.add(step.token)
            if step.finish_reason is not None:
                text += detokenizer.flush()
        return cls(
            text=text,
            id=step.token,
            ms=1000 * seconds,
            stall_ms=1000 * (after.stall_s - before.stall_s),
            hits=after.hits - before.hits,
            misses=after.misses - before.misses,
            bytes_h2d=after.bytes_h2d - before.bytes_h2d,
            bytes_disk=after.bytes_disk - before.bytes_disk,
            finish_reason=step.finish_reason,
            logprob=None if step.logprobs is None else step.logprobs.logprob,
            top_logprobs=None if step.logprobs is None else step.logprobs.top_logprobs,
        )


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Figures of one generation. `counts` are the store's, of this generation alone."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    """Time to first token: from the call to the first new token."""
    decode_s: float
    """From the first new token to the last."""
    counts: Stats

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, the first left out; 0 for fewer than two tokens."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def hits(self) -> int:
        return self.counts.hits

    @property
    def misses(self) -> int:
        return self.counts.misses

    @property
    def stall_s(self) -> float:
        return self.counts.stall.total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        counts = self.counts.to_dict()
        counts.pop("starved")  # a matter of long runs, not of one answer
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
            **counts,
        }


@dataclass(frozen=True, slots=True)
class Output:
    """A finished answer. `token_ids` are the new ones, an end-of-sequence token included."""

    text: str
    """All that the model wrote, thoughts, and calls with their marks, included; but for special tokens."""
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: list[LogProbs] | None = None
    """`logprob` and `top_logprobs` of each of `token_ids`, as a Token has them; None unless asked for."""
    message: dict[str, Any] | None = None
    """The answer as a message of OpenAI's, to append to the conversation: its role and content, and where
    there are any, `reasoning_content`, without which the content is, and `tool_calls`, if `tools` were given.
    None without a tokenizer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        scores = {} if self.logprobs is None else {"logprobs": [s._asdict() for s in self.logprobs]}
        message = {} if self.message is None else {"message": self.message}
        return {
            "text": self.text,
            **message,
            "token_ids": self.token_ids,
            "finish_reason": str(self.finish_reason),
            **scores,
            "stats": self.stats.to_dict(),
        }
