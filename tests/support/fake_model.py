"""A model that answers at once and always the same, for tests of the command line.

As a script it is the `moe-local` command with that model behind `load`, for tests that need a terminal; so
it imports nothing that brings transformers, which takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moe_local.cache.cache_map import CacheView
from moe_local.cache.errors import ContextLengthError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.stats import PrefetchStats, RoutedTokens, StallSeconds, Stats
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.records import GenerationStats, Output, Token

if TYPE_CHECKING:
    from moe_local.offload.engine.sequence import FinishReason

COUNTS = Stats(
    hits_by_layer=(7, 7),
    misses_by_layer=(1, 1),
    evictions=3,
    prefetch=PrefetchStats(4, 2, 1, 2048, "on", 2, 3.1, 2.75, 3.5),
    stall=StallSeconds(disk=0.5),
    tokens=10,
    routed=RoutedTokens(((0,) * 4, (0,) * 4), (0, 0)),
)


class FakeStream:
    """As TokenStream: words of the answer, one token each."""

    def __init__(
        self, model: FakeModel, asked: tuple[Any, dict[str, Any]], prompt_tokens: int, words: list[str]
    ) -> None:
        self._model = model
        self._asked = asked
        self._words = words
        self.text = ""
        self.prompt_ids = list(range(prompt_tokens))
        self.max_new_tokens: int = asked[1].get("max_new_tokens", 512)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | str | None = None
        self.filled_context = model.fills_context
        self.closed = False

    def __iter__(self) -> Iterator[Token]:
        self._model.asked.append(self._asked)
        for index, word in enumerate(self._words):
            if isinstance(self._model.failure, BaseException) and index == self._model.fails_at:
                self.close()
                raise self._model.failure
            time.sleep(self._model.seconds)
            last = index == len(self._words) - 1
            self.text += word
            self.token_ids.append(index)
            if last:
                self.finish_reason = self._model.finish_reason
            yield Token(word, index, 1.0, 0.5, 7, 1, 0, 0, self.finish_reason)
        self.close()

    def close(self) -> None:
        self.closed = True

    @property
    def stats(self) -> GenerationStats:
        return GenerationStats(5, len(self.token_ids), ttft_s=0.25, decode_s=0.5, counts=COUNTS)

    def output(self) -> Output:
        for _ in self:
            pass
        return Output(self.text, self.token_ids, self.finish_reason or "length", self.stats)


class FakeModel:
    """Answers every message with its number in what it was shown and its words in capitals.

    A last word of "endlessly" comes again and again. Each word of a prompt is a token.
    """

    name = "fake"
    tokenizer: Any = None

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        """That each token takes."""
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        """Prompt and generation options of every answer."""
        self.streams: list[FakeStream] = []
        self.finish_reason: FinishReason | str = "stop"
        self.fills_context = False
        self.failure: BaseException | None = None
        self.fails_at = 0
        self.refusal: Exception | None = None
        self.says: list[str] | None = None
        """The words of every answer, if they are to be others."""
        self.plan: Any = SimpleNamespace(request=SimpleNamespace(context=1000))
        self.open = True

    @property
    def answers(self) -> AnswerFormat:
        return answer_format(self.tokenizer)

    def stream(self, prompt: Any, **options: Any) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        tokens, context = len(" ".join(texts).split()), self.plan.request.context
        if tokens > context:
            raise ContextLengthError(f"the prompt has {tokens} tokens, the context holds {context}")
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        number = 1 if isinstance(prompt, str) else sum(message["role"] == "user" for message in prompt)
        words = [f"{number}:"] + [f" {word.upper()}" for word in last.split()]
        if words[-1] == " ENDLESSLY":
            words += 10_000 * words[-1:]
        self.streams.append(FakeStream(self, (prompt, options), tokens, self.says or words))
        return self.streams[-1]

    def stats(self) -> Stats:
        return COUNTS

    def cache_view(self) -> CacheView:
        cache = ExpertCache([2, 2])
        cache.preload(0, 1)
        cache.complete(0, 1)
        cache.preload(1, 3)
        return CacheView(cache, [4, 4])

    def close(self) -> None:
        self.open = False

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


if __name__ == "__main__":
    import moe_local
    from moe_local.cli.main import main

    moe_local.load = lambda model, **options: FakeModel(seconds=0.2)
    main()
