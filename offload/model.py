"""A loaded model: generate, stream, statistics, close."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from moe_local.cache.cache_map import CacheView
from moe_local.cache.errors import MoeLocalError, first_line
from moe_local.cache.files import Use
from moe_local.cache.stats import Stats
from moe_local.offload.answer_format.answer_format import AnswerFormat, functions_of
from moe_local.offload.answer_format.choose import answer_format
from moe_local.offload.batcher import Batcher, Listener, Ticket
from moe_local.offload.engine.batch import generate_ids
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.grammar import matcher
from moe_local.offload.engine.sampling import (
    Settings,
    form,
    imply_sampling,
    make_settings,
    refuse_beyond_loop,
    vocabulary_size,
)
from moe_local.offload.engine.stops import stop_strings
from moe_local.offload.engine.text import Detokenizer, Prompt, encode_prompt
from moe_local.offload.expert_file.usage import add_usage
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.gpu.custody import Switch
from moe_local.offload.message import MessageReader
from moe_local.offload.prefetch.prefetch import Prefetcher
from moe_local.offload.ranges import plain, plain_number
from moe_local.offload.records import Output
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.stream import TokenStream
from moe_local.offload.system import interrupt
from moe_local.offload.turn import Turn

if TYPE_CHECKING:
    from moe_local.offload.plan.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a Model is made of: everything that takes memory."""

    hf: Any
    engine: Engine
    store: ExpertStore
    prefetcher: Prefetcher
    switch: Switch | None
    """Switches between misses served by the device and by the host; None if only the host can serve them."""


class Model:
    """A model whose routed experts are served by an ExpertStore; made by `load`, freed by `close`.

    It computes one answer at a time; other threads wait their turn. It owns the transformers model, the
    key-value memory and all tiers, and stays usable after any error or Ctrl-C during generation.
    """

    def __init__(
        self,
        name: str,
        hf: Any,
        tokenizer: Any,
        *,
        engine: Engine,
        store: ExpertStore,
        prefetcher: Prefetcher,
        plan: Plan,
        expert_folder: Path,
        use: Use,
        switch: Switch | None = None,
    ) -> None:
        """Use `load` to make one. This takes ownership of everything it is given."""
        self.name = name
        self._plan = plan
        self.tokenizer = tokenizer
        """transformers' tokenizer; None for a folder without one."""
        self._answers = answer_format(tokenizer)
        self._parts: Parts | None = Parts(hf, engine, store, prefetcher, switch)
        """None once the model is closed. Methods read it once, so a concurrent close does not affect them."""
        self.expert_folder = expert_folder
        """Where its expert file is."""
        self._use = use
        self._turn = Turn()
        self._streams: weakref.WeakSet[TokenStream] = weakref.WeakSet()
        self._batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._streams_lock = threading.Lock()

    @property
    def hf(self) -> Any:
        """The transformers model. Plain calls and its own generate work, offloaded."""
        return self._open().hf

    @property
    def answers(self) -> AnswerFormat:
        """How it writes thoughts, content and calls, by what the tokenizer's chat template is now."""
        if not self._answers.is_of(self.tokenizer):
            self._answers = answer_format(self.tokenizer)
        return self._answers

    @property
    def plan(self) -> Plan:
        """What lies where: as planned and allocated, less the slots that were given up since."""
        parts = self._parts
        if parts is not None and parts.store.below is not None:
            slots = tuple(parts.store.slots(layer) for layer in range(len(self._plan.vram_slots)))
            if slots != self._plan.vram_slots:
                mode = "disk" if self._plan.mode == "resident" else self._plan.mode
                self._plan = replace(self._plan, vram_slots=slots, mode=mode)
        return self._plan

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        marks: Iterable[str] = (),
        logprobs: int | None = None,
        **options: Any,
    ) -> TokenStream:
        """The answer to `prompt`, token by token. Nothing is computed before the first token is asked for.

        `prompt`: text (one user turn if there is a chat template, unless `template=False`), a list of
        messages, or token ids. `tools` (JSON schemas, as OpenAI's API has them) and further variables, as in
        `chat_template_kwargs={"enable_thinking": False}`, are for the chat template. `stop` ends the answer
        after any of these strings; `seed` makes sampling repeatable. Special tokens are left out of the text,
        except for those named in `marks`. With `logprobs` (0 to 20), each Token has its log probability and
        those of this many likeliest tokens, in the model's own distribution, which sampling options do not
        change.

        `options` are transformers' generation options; temperature, top_p and the like turn sampling on. In
        addition there are: `json_schema`, a dict, for an answer in JSON that follows it, or `grammar`, text
        in llguidance's Lark; and `frequency_penalty`, `presence_penalty` and `logit_bias` as in OpenAI's API.
        Defaults come from the checkpoint's generation_config, with 512 new tokens.

        A model that thinks may do so before the JSON, unless thoughts are turned off, and gpt-oss writes it
        into its final channel. All of that is in the text, so read it from `Output.message["content"]`, or
        split the tokens' text by `answers.parser`. A grammar begins in the same place, unless its first line
        names the mark of a thought, `<think>` or `<|channel|>`: then it is of the whole answer.

        Raises OptionError for options and prompts that cannot be served.
        """
        parts = self._open()
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        if logprobs is not None:
            options["logprobs"] = logprobs
        asked = self._prepare(
            parts.hf,
            prompt,
            seed=seed,
            stop=stop,
            template=template,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            marks=marks,
            **options,
        )
        parts.engine.check_prompt(*asked[:2])
        reader = None
        if self.tokenizer is not None:
            functions = functions_of(tools) if tools else None
            reader = MessageReader(self.answers, asked[0], functions, plain=not template)
        stream = TokenStream(parts.engine, parts.store, self._turn, *asked, reader)
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def _prepare(
        self,
        hf: Any,
        prompt: Prompt,
        *,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        marks: Iterable[str] = (),
        **options: Any,
    ) -> tuple[list[int], Settings, Detokenizer | None]:
        """The ids and settings that the engine takes for a prompt, and what turns its tokens into text."""
        ids = encode_prompt(
            self.tokenizer,
            prompt,
            template=template,
            tools=tools,
            variables=chat_template_kwargs,
            answers=self.answers,
        )
        if stop is not None:
            options["stop_strings"] = stop_strings(stop)
        options = imply_sampling(plain(options))
        refuse_beyond_loop(hf, options)
        settings = make_settings(
            hf, ids, self.answers, tokenizer=self.tokenizer, seed=plain_number(seed), **options
        )
        return ids, settings, None if self.tokenizer is None else Detokenizer(self.tokenizer, marks)

    def check_form(self, options: Mapping[str, Any], prompt_ids: Sequence[int]) -> None:
        """Raise OptionError if `json_schema` or `grammar` in `options` cannot be served. Any thread.

        Compiles them for an answer to the prompt, which may take a second, also for later answers.
        """
        if (grammar := form(options, prompt_ids, self.answers)) is not None:
            matcher(self.tokenizer, grammar, vocabulary_size(self._open().hf))

    def batcher(self, *, queue: int = 64) -> Batcher:
        """A Batcher, which answers several prompts at once: up to `parallel` of `load`.

        `queue`: how many more prompts may wait. The caller closes it; closing the model closes it, too.
        """
        parts = self._open()
        batcher = Batcher(parts.engine, parts.store, self._turn, queue=queue)
        with self._streams_lock:
            self._batchers.add(batcher)
        return batcher

    def submit(
        self,
        batcher: Batcher,
        prompt: Prompt,
        listener: Listener,
        *,
        patience_s: float | None = None,
        prompt_logprobs: bool = False,
        **options: Any,
    ) -> Ticket:
        """Have a batcher answer `prompt`; arguments and errors are those of `stream`. Any thread.

        With `prompt_logprobs`, the ticket also has what `logprobs` asks for of the prompt's tokens. The whole
        prompt is then computed, even if an earlier one began alike.
        """
        hf = self._open().hf
        ids, settings, detokenizer = self._prepare(hf, prompt, **options)
        settings.prompt_logprobs = prompt_logprobs
        return batcher.submit(ids, settings, detokenizer, listener, patience_s=patience_s)

    @overload
    def generate(self, prompt: torch.Tensor, **options: Any) -> torch.Tensor: ...

    @overload
    def generate(self, *, input_ids: torch.Tensor, **options: Any) -> torch.Tensor: ...

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Output: ...

    def generate(self, prompt: Prompt | torch.Tensor | None = None, **options: Any) -> Output | torch.Tensor:
        """The whole answer to `prompt`; arguments are those of `stream`.

        Ids in, ids out: a tensor [B, n] (rows of different length are left-padded, with an `attention_mask`)
        gives [B, n + new] exactly as transformers' generate does, and all of its arguments pass through.
        `logprobs` is refused, as a tensor of ids has no place for them. A tokenizer's result can be passed as
        in transformers: `generate(**tokenizer(texts, return_tensors="pt", padding=True))`.
        """
        if prompt is None:
            prompt = options.pop("input_ids", None)
        if not isinstance(prompt, torch.Tensor):
            return self.stream(prompt, **options).output()
        parts = self._open()
        options = {"tokenizer": self.tokenizer, **plain(options)}
        with interrupt.deferred():
            self._turn.begin()
            try:
                before = parts.engine.tokens
                ids: torch.Tensor = generate_ids(parts.engine, prompt, **options)
                parts.store.tokens += parts.engine.tokens - before or _new_tokens(prompt, ids)
                return ids
            finally:
                self._turn.end()

    @property
    def parts(self) -> Parts:
        """What the model is made of, for measurements. For answers use `stream` and `generate`."""
        return self._open()

    def stats(self) -> Stats:
        """Counts since load. Any thread; while another one computes a token, up to the token before."""
        return self._open().store.snapshot()

    def cache_view(self) -> CacheView:
        """Shows which expert is where. Call it between two tokens, in the thread that generates."""
        store = self._open().store
        store.custody.catch_up()
        return CacheView(store.tier.cache, [len(experts) for experts in store.layouts])

    def close(self) -> None:
        """Free all memory, threads and files; the model then refuses to answer. Idempotent.

        Waits for an answer in another thread to end. Unfinished streams of this thread are closed, and so are
        the answers of batchers.
        """
        if self._turn.lost:  # a fork's copy, without the threads that would have to end
            return
        with interrupt.deferred():
            for batcher in list(self._batchers):
                batcher.close(self._closed_message)
            if self._turn.mine:
                self._retire_streams()
            try:
                self._turn.begin()
            except MoeLocalError:
                if self._parts is None:  # closed before, perhaps while this thread waited
                    return
                raise
            try:
                parts, self._parts = self._open(), None
                self._turn.retire(self._closed_message)
                self._retire_streams()
                self._free(parts)
            finally:
                self._turn.end()

    def _retire_streams(self) -> None:
        with self._streams_lock:
            streams = list(self._streams)
        for stream in streams:
            stream.retire(self._closed_message)

    def _free(self, parts: Parts) -> None:
        with contextlib.ExitStack() as undo:  # whatever fails, the rest is freed all the same
            undo.callback(self._use.close)
            undo.callback(parts.store.close)
            undo.callback(self._retire_modules, parts.hf)
            undo.callback(parts.prefetcher.close)
            try:
                add_usage(self.expert_folder, parts.store.routed.snapshot())
            except RuntimeError as error:  # a device that is gone has taken its counts along
                logger.warning(
                    "which experts %s chose in this run is not kept: %s", self.name, first_line(error)
                )

    def _retire_modules(self, hf: Any) -> None:
        for module in hf.modules():
            if isinstance(module, OffloadedExperts):
                module.retire(self._closed_message)

    def check_integrity(self) -> None:
        """Raise if the bookkeeping of engine, store and cache contradicts itself."""
        parts = self._open()
        parts.engine.check_integrity()
        parts.store.check_integrity()

    def __enter__(self) -> Model:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MoeLocalError(
            f"the loaded model {self.name} cannot be copied or pickled; load() it where it is needed"
        )

    def __repr__(self) -> str:
        state = "closed" if self._parts is None else self.plan.mode
        return f"<moe_local.Model {self.name}, {state}>"

    @property
    def _closed_message(self) -> str:
        return f"the model {self.name} is closed; load() it again"

    def _open(self) -> Parts:
        """What the model is made of. Raises MoeLocalError once it is closed."""
        parts = self._parts
        if parts is None:
            raise MoeLocalError(self._closed_message)
        return parts


def _new_tokens(prompt: torch.Tensor, result: Any) -> int:
    """Tokens that transformers' own generate added, those behind an end included."""
    ids = result if isinstance(result, torch.Tensor) else result.sequences
    return int(ids.shape[0] * (ids.shape[1] - prompt.shape[1]))
