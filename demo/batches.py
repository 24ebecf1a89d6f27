"""Corpus to padded batches of token ids with a loss weight for each token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_local.demo.corpus import Corpus, Turn
from moe_local.demo.documents import documents
from moe_local.demo.tokenizer import ASSISTANT, BOS, END, PAD, SYSTEM, USER

USER_WEIGHT = 0.1
OPENING_WEIGHT = 4.0  # the first tokens of an answer decide which answer it is
OPENING_TOKENS = 6
LONGEST = 320
_POOL = 2048  # conversations sorted by length at a time, so that little is padding
_DOCUMENT_SHARE = 0.08  # of batches
_DOCUMENT_TOKENS = 256
_SYSTEM_SHARE = 0.08
_CUT_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids` (B, S) int64 padded with PAD at the right; `weights` (B, S) float, of each token as a target."""

    ids: Tensor
    weights: Tensor


class Encoder:
    """Turns conversations and documents into ids and weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, with no special tokens."""
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    def conversation(
        self, turns: list[Turn], system: str | None = None, last: int | None = None
    ) -> tuple[list[int], list[float]]:
        """(ids, weights) in the layout of the chat template; `last` cuts the last answer after so many."""
        texts = [text for turn in turns for text in (turn.question, turn.answer)]
        pieces = self.pieces([*texts, system or ""])
        ids, weights = [BOS], [0.0]
        if system:
            ids += [SYSTEM, *pieces[-1], END]
            weights += [0.0] * (len(pieces[-1]) + 2)
        for at in range(0, len(texts), 2):
            question, answer = pieces[at], [*pieces[at + 1], END]
            if last is not None and at == len(texts) - 2:
                answer = answer[:last]
            ids += [USER, *question, END, ASSISTANT, *answer]
            weights += [USER_WEIGHT] * (len(question) + 2) + [0.0]
            weights += [OPENING_WEIGHT if i < OPENING_TOKENS else 1.0 for i in range(len(answer))]
        return ids[:LONGEST], weights[:LONGEST]

    def stream(self, texts: tuple[str, ...]) -> Tensor:
        """All texts as one long row of ids, each between BOS and END."""
        return torch.tensor([i for piece in self.pieces(list(texts)) for i in (BOS, *piece, END)])


class Batches:
    """Endless batches of about `batch_tokens`; pool p depends on (seed, p) only: a run can resume."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int
    ) -> None:
        self._corpus, self._encoder, self._seed, self._size = corpus, Encoder(tokenizer), seed, batch_tokens
        self._documents = self._encoder.stream(documents()[0])

    def pool(self, number: int, *, early: bool) -> Iterator[Batch]:
        """The batches of one pool, shuffled.

        `early` pools are mostly single turns.  Later ones often end in a cut answer: the answers are long
        known by heart then, and what is left to learn lies in the question and the first tokens.
        """
        rng = random.Random(f"{self._seed}/{number}")
        rows = []
        for _ in range(_POOL):
            turns = self._corpus.conversation(rng, 1 if early and rng.random() < 0.7 else None)
            system = self._corpus.system_prompt(rng) if rng.random() < _SYSTEM_SHARE else None
            last = rng.randint(8, 14) if not early and rng.random() < _CUT_SHARE else None
            rows.append(self._encoder.conversation(turns, system, last))
        batches = list(self._by_length(rows))
        documents_wanted = round(len(batches) * _DOCUMENT_SHARE)
        batches += [self._document_batch(rng) for _ in range(documents_wanted)]
        rng.shuffle(batches)
        return iter(batches)

    def _by_length(self, rows: list[tuple[list[int], list[float]]]) -> Iterator[Batch]:
        rows.sort(key=lambda row: len(row[0]))
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and len(rows[end][0]) * (end + 1 - start) <= self._size:
                end += 1
            chunk, width = rows[start:end], len(rows[end - 1][0])
            yield Batch(
                torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in chunk]),
                torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in chunk]),
            )
            start = end

    def _document_batch(self, rng: random.Random) -> Batch:
        starts = [
            rng.randrange(len(self._documents) - _DOCUMENT_TOKENS)
            for _ in range(self._size // _DOCUMENT_TOKENS)
        ]
        ids = torch.stack([self._documents[s : s + _DOCUMENT_TOKENS] for s in starts])
        return Batch(ids, torch.ones(ids.shape))
