"""The decode loop: sequences join, are stepped, and leave.

It drives any causal language model of transformers through its plain forward; it need not know that experts
may lie in RAM or on disk. transformers' generate is the reference for every token in tests, but is not used
to decode: it spends a millisecond a token on bookkeeping, and all rows of its batch start and end together.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Any

import torch
from torch import nn

from moe_local.cache.errors import ContextLengthError, MoeLocalError, OptionError
from moe_local.cache.keys import format_bytes
from moe_local.offload.dense.linear import FEW_TOKENS as FEW_PLAIN_TOKENS
from moe_local.offload.dense.linear import NativeLinear
from moe_local.offload.engine.batch_view import BatchMasks
from moe_local.offload.engine.graphs import Graphs
from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.kv_slab import KVSlab, cache_argument
from moe_local.offload.engine.logprobs import LogProbs, scored_chunk
from moe_local.offload.engine.picking import Pick, blamed_on, draws_undone, pick_tokens, score_prompt
from moe_local.offload.engine.prefix import copy_prefix, until_snapshot
from moe_local.offload.engine.recording import Saw
from moe_local.offload.engine.rows import Rows
from moe_local.offload.engine.sampling import Settings
from moe_local.offload.engine.sequence import FinishReason, Sequence, Step, Work
from moe_local.offload.engine.shelf import Shelf
from moe_local.offload.engine.token_step import TokenStep, TokenWatch
from moe_local.offload.gpu.relief import Shortage, shortage
from moe_local.offload.plan.footprint import MIN_CHUNK
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.system import interrupt
from moe_local.offload.system.threads import one_torch_thread

logger = logging.getLogger(__name__)

KEEP = "logits_to_keep"
"""transformers' name for the number of last tokens whose logits are computed."""

FEW_TOKENS, SHORT_CONTEXT, SMALL_MATRIX = 16, 2048, 1 << 20
"""Up to this many new tokens, this many before them, and this many weights in a matrix, one thread is enough
for the operations that torch computes."""


class Engine:
    """Steps up to `kv.rows` sequences. To be used by one thread at a time; the caller owns model and memory.

    A step that raises, KeyboardInterrupt included, leaves every sequence as it was: lengths change only after
    all that can fail, and what a sequence still has to compute is derived from its length in the cache.
    So a step that ran out of the device's memory is run again once memory has been freed.
    """

    def __init__(self, hf: Any, kv: KVRows, *, chunk: int, shelf_bytes: int = 0) -> None:
        """`chunk`: most prompt tokens in one forward; between two, other sequences and Ctrl-C get a turn.
        `shelf_bytes`: RAM for conversations whose rows are needed for others."""
        self.hf = hf
        self.kv = kv
        self.chunk = chunk
        embeddings = hf.get_input_embeddings()
        self.device: torch.device = embeddings.weight.device
        self.vocab_size = int(embeddings.weight.shape[0])
        self._forward_options: dict[str, Any] = {"use_cache": True}
        if KEEP in inspect.signature(hf.forward).parameters:
            self._forward_options[KEEP] = 1
        self._cache_argument = cache_argument(hf)
        self.token_step: TokenStep | None = None
        """What computes forwards of one token, if not the model's plain forward."""
        large = [
            module
            for module in hf.modules()
            if isinstance(module, nn.Linear) and module.weight.numel() > SMALL_MATRIX
        ]
        self._fits_one_thread = 0
        """How many tokens do; 0: none."""
        if self.device.type == "cpu" and all(isinstance(module, NativeLinear) for module in large):
            self._fits_one_thread = FEW_PLAIN_TOKENS if large else FEW_TOKENS
        self.tokens = 0
        """New tokens so far, of all sequences."""
        self.relief: Callable[[Shortage], bool] | None = None
        """Frees device memory that a step lacked, and returns whether it did; None: nothing can be freed."""
        self.most_context: int | None = None
        """Most tokens of context that the model takes; None: unknown. Only errors speak of it."""
        self._rows = Rows(kv, Shelf(kv, shelf_bytes))
        self._turn = 0
        self._masks: BatchMasks | None = None
        self._had_prompt = False
        """Whether the last step computed a part of a prompt."""

    def make_token_step(
        self,
        graphs: Graphs | None,
        sites: Ids[RouterSite | None] = (),
        saw: Saw | None = None,
        watch: TokenWatch | None = None,
    ) -> TokenStep:
        """A TokenStep for this model and its memory, which is a KVSlab."""
        assert isinstance(self.kv, KVSlab)
        return TokenStep(
            self.hf,
            self.kv,
            graphs,
            cache_argument=self._cache_argument,
            options=self._forward_options,
            sites=sites,
            saw=saw,
            watch=watch,
        )

    @property
    def active(self) -> list[Sequence]:
        """Sequences that have joined and not left, by row."""
        return self._rows.active

    @property
    def free_rows(self) -> int:
        return self._rows.free

    def join(self, prompt_ids: Ids[int], settings: Settings, *, reuse: bool = False) -> Sequence:
        """Add a prompt to the steps that follow; nothing is computed yet.

        With `reuse`, the keys and values of a sequence that has left are reused as far as both have the same
        tokens; `row_to_go_on` chooses the sequence. Raises OptionError as `check_prompt`, MoeLocalError where
        no row is free.
        """
        ids = list(prompt_ids)
        self.check_prompt(ids, settings)
        reuse = reuse and not settings.prompt_logprobs  # reused tokens have no logits
        if self.free_rows == 0:
            raise MoeLocalError(
                f"all {self.kv.rows} sequences are in use; one has to leave before another joins"
            )
        deadline = None if settings.max_time is None else time.monotonic() + settings.max_time
        sequence = None
        try:
            with interrupt.deferred():
                sequence = self._rows.join(ids, settings, reuse=reuse)
        except BaseException:
            if sequence is not None:  # a Ctrl-C meanwhile, raised at the end of the block
                self._rows.leave(sequence)
            raise
        sequence.deadline = deadline
        return sequence

    def check_prompt(self, ids: Ids[int], settings: Settings) -> None:
        """Raises OptionError for an empty prompt, too long a one, or an id beyond the vocabulary.

        Also where `settings` ask for log probabilities of the prompt, and this model cannot give them.
        """
        if not ids:
            raise OptionError("the prompt is empty; it needs at least one token")
        if len(ids) > self.kv.capacity:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds {self.kv.capacity}; {self._remedy()}"
            )
        self.check_ids(ids)
        if settings.prompt_logprobs and self.kv.whole_prompt_only:
            raise OptionError(
                "logprobs of a prompt cannot be had of this model, which reads prompts in one piece; ask for "
                "those of the answer alone"
            )

    def _remedy(self) -> str:
        """Of a prompt that is too long."""
        if self.most_context is None:
            return "shorten it or raise --context"
        if self.most_context > self.kv.capacity:
            return f"shorten it or raise --context, {self.most_context} at most"
        return "shorten it: the model takes no more"

    def check_ids(self, ids: Ids[int]) -> None:
        """Raises OptionError for an id beyond the vocabulary; `ids` are not empty."""
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise OptionError(
                f"token id {bad} in the prompt is outside the vocabulary, 0 to {self.vocab_size - 1}"
            )

    def leave(self, sequence: Sequence) -> None:
        """Remove a sequence, finished or not. Its row stays parked, for reuse, until a row is needed."""
        self._rows.leave(sequence)
        sequence.seen = None
        sequence.prompt_logprobs = []

    def forget(self) -> None:
        """Free all parked rows, and forget shelved ones."""
        self._rows.forget()

    def step(self) -> list[Step]:
        """Compute the next forward and return its new tokens; none if it was only a part of a long prompt.

        Raises KeyboardInterrupt at a safe point for a Ctrl-C during the step, SequenceError where a single
        sequence is at fault, and what the model raises.
        """
        with interrupt.deferred(), torch.inference_mode():
            while True:
                turn, had_prompt = self._turn, self._had_prompt
                work: list[Work] = []
                try:
                    work = self._schedule()
                    if not work:
                        return []
                    logits = self._forward(work)
                    with draws_undone(work):
                        picks = self._sample(work, logits)
                        scores = [
                            score_prompt(item, self.kv.lens[item.sequence.row], logits) for item in work
                        ]
                        reasons = [self._finish_reason(*pair) for pair in zip(work, picks, strict=True)]
                except BaseException as error:
                    for item in work:
                        self.kv.abort(item.sequence.row)
                    lacking = shortage(error)
                    if lacking is None:
                        raise
                else:
                    return self._commit(work, picks, scores, reasons)
                # Only here, outside the except block, is the traceback gone, which kept the step's tensors.
                self._turn, self._had_prompt = turn, had_prompt
                self._make_room(lacking, work)

    def _make_room(self, lacking: Shortage, work: list[Work]) -> None:
        """Free memory that a step lacked: cache fewer experts, else shorten chunks, else give up graphs.

        `work`: its forward; empty if it came to none. Raises MoeLocalError if none of these is possible.
        """
        if self.relief is not None and self.relief(lacking):
            return
        shorter = min(self.chunk, max((len(item.ids) for item in work), default=0)) // 2
        if shorter < MIN_CHUNK or self.kv.whole_prompt_only:
            if self.token_step is not None and self.token_step.make_room():
                return
            asked = f" ({format_bytes(lacking.nbytes)} more were asked for)" if lacking.nbytes else ""
            raise MoeLocalError(
                f"VRAM ran out{asked} and no expert is left that could give way; close other programs on the "
                "card, or load with a smaller --context or --dense nf4"
            )
        self.chunk = shorter
        logger.warning("VRAM ran out: prompts go in chunks of %d tokens from now on", shorter)

    def _schedule(self) -> list[Work]:
        """The rows of the next forward: all that decode, alternating with one that has a prompt to compute.

        Where rows cannot be batched in one forward, they take turns.
        """
        running = [sequence for sequence in self.active if sequence.finish_reason is None]
        if self.kv.can_batch:
            decoding = [sequence for sequence in running if self._todo(sequence) == 1]
            prompts = [sequence for sequence in running if self._todo(sequence) > 1]
            if decoding and (self._had_prompt or not prompts):
                self._had_prompt = False
                # Graphs belong to a row, so with them one sequence moves to the front, too.
                if len(decoding) > 1 or (self.token_step is not None and self.token_step.captures):
                    decoding = self._rows.to_front(decoding)
                return [self._work(sequence) for sequence in decoding]
            running = prompts
        if not running:
            return []
        sequence = next((s for s in running if s.row >= self._turn), running[0])
        self._turn = sequence.row + 1
        self._had_prompt = True
        copy_prefix(self.kv, self._rows.members, sequence)
        if sequence.shares:
            self.kv.snapshot(sequence.row)
        return [self._work(sequence)]

    def _todo(self, sequence: Sequence) -> int:
        """How many tokens of the sequence are not computed yet."""
        return len(sequence.ids) - self.kv.lens[sequence.row]

    def _work(self, sequence: Sequence) -> Work:
        done = self.kv.lens[sequence.row]
        todo = len(sequence.ids) - done
        scored = sequence.settings.prompt_logprobs and done < sequence.prompt_len - 1
        wanted = min(self.chunk, scored_chunk(self.vocab_size)) if scored else self.chunk
        count = self.kv.chunk(sequence.row, todo, min(wanted, until_snapshot(self.kv, sequence)))
        return Work(sequence, sequence.ids[done : done + count], samples=count == todo, scored=scored)

    def _forward(self, work: list[Work]) -> torch.Tensor:
        """Logits of each row's last token, [len(work), vocabulary], fp32. A scored row is computed alone, and
        gives the logits of all its ids."""
        with one_torch_thread() if self._is_small(work) else contextlib.nullcontext():
            return self._forward_row(work[0]) if len(work) == 1 else self._forward_batch(work)

    def _is_small(self, work: list[Work]) -> bool:
        """Whether the C++ library does nearly all of the work, and is faster with all cores to itself."""
        tokens = sum(len(item.ids) for item in work)
        return tokens <= self._fits_one_thread and all(
            self.kv.lens[item.sequence.row] <= SHORT_CONTEXT for item in work
        )

    def _forward_batch(self, work: list[Work]) -> torch.Tensor:
        """The first rows, one token each: an expert that several rows need is fetched once."""
        cache = self.kv.batch(len(work))
        if self._masks is None:
            self._masks = BatchMasks(self.hf, self.kv.windows)
        output = self.hf(
            input_ids=torch.tensor([item.ids for item in work], device=self.device),
            position_ids=self.kv.places.columns[:, None],
            attention_mask=self._masks.make(self.kv.places),
            **{self._cache_argument: cache},
            **self._forward_options,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _forward_row(self, item: Work) -> torch.Tensor:
        """One sequence, any number of tokens, without a mask, since a mask would hide nothing."""
        if self.token_step is not None and len(item.ids) == 1:
            return self.token_step.logits(item.sequence.row, item.ids[0])
        return self.plain_logits(item.sequence.row, item.ids, keep=len(item.ids) if item.scored else 1)

    def plain_logits(self, row: int, ids: list[int], *, keep: int = 1) -> torch.Tensor:
        """The model's forward of the next `ids` of a row; logits of its last, [keep, vocabulary] fp32."""
        start = self.kv.lens[row]
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        output = self.hf(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=positions,
            **{self._cache_argument: self.kv.row(row)},
            **{name: keep if name == KEEP else value for name, value in self._forward_options.items()},
        )
        logits: torch.Tensor = output.logits[0, -keep:].float()
        return logits

    def _sample(self, work: list[Work], logits: torch.Tensor) -> list[Pick | None]:
        """The next token of each row; None for a row in the middle of its prompt."""
        lasts = logits[-len(work) :].split(1)
        rows = [(item.sequence, last) for item, last in zip(work, lasts, strict=True) if item.samples]
        picks = iter(pick_tokens(rows, self._seen))
        return [next(picks) if item.samples else None for item in work]

    def _seen(self, sequence: Sequence) -> torch.Tensor:
        """The ids of a sequence on the device, [1, length]; only the newest is copied there."""
        ids = sequence.ids
        if sequence.seen is None:
            seen = torch.empty((1, self.kv.capacity + 1), dtype=torch.long, device=self.device)
            seen[0, : len(ids)] = torch.tensor(ids, device=self.device)
            sequence.seen = seen  # only now: filling it may have failed
        sequence.seen[0, len(ids) - 1] = ids[-1]
        return sequence.seen[:, : len(ids)]

    def _commit(
        self,
        work: list[Work],
        picks: list[Pick | None],
        scores: list[list[LogProbs]],
        reasons: list[FinishReason | None],
    ) -> list[Step]:
        """Make the step's tokens valid, and hand out the new ones. Asks no device, so it is done wholly."""
        steps = []
        for item, pick, scored, reason in zip(work, picks, scores, reasons, strict=True):
            sequence = item.sequence
            done = self.kv.lens[sequence.row]
            sequence.prompt_logprobs[done : done + len(scored)] = scored
            self.kv.advance(sequence.row, len(item.ids))
            if pick is not None:
                sequence.ids.append(pick.token)
                self.tokens += 1
                sequence.finish_reason = reason
                steps.append(Step(sequence, pick.token, reason, pick.logprobs))
        return steps

    def _finish_reason(self, item: Work, pick: Pick | None) -> FinishReason | None:
        """Why a sequence ends with its new token, which is not among its ids yet; None if it does not."""
        if pick is None:
            return None
        sequence, settings = item.sequence, item.sequence.settings
        length = len(sequence.ids) + 1
        if pick.token in settings.eos_ids:
            return FinishReason.STOP
        if settings.stops is not None:
            with blamed_on(sequence):
                if settings.stops.completed(sequence.ids, sequence.prompt_len, pick.token):
                    return FinishReason.STOP
        if length - sequence.prompt_len >= settings.max_new_tokens:
            return FinishReason.LENGTH
        # the last token needs no column: it would be fed only to compute the next one
        if length > self.kv.capacity:
            return FinishReason.LENGTH
        if sequence.deadline is not None and time.monotonic() > sequence.deadline:
            return FinishReason.LENGTH
        return None

    def check_integrity(self) -> None:
        """Raises AssertionError when the bookkeeping contradicts itself."""
        self._rows.check_integrity()
