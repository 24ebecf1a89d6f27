"""Penalties for tokens that occurred before, and biases of single tokens, as in OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from moe_local.cache.errors import OptionError

MOST_BIAS = 100.0


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """score[t] + bias[t] - frequency * count[t] - presence * (count[t] > 0), where count[t] is how often
    token t occurs in the answer so far. The formula and its names are those of OpenAI's API reference.

    Counts the tokens after the prompt, so it serves one sequence only. Scores may be on any device.
    """

    def __init__(
        self, prompt_len: int, *, frequency: float = 0, presence: float = 0, bias: Mapping[int, float] | None
    ) -> None:
        """`bias`: by token id."""
        self._counted = prompt_len
        self._frequency = frequency
        self._presence = presence
        self._bias = dict(bias or {})
        self._counts: torch.Tensor | None = None
        self._biases: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [1, length], scores [1, vocabulary] -> new scores; the given ones are not changed."""
        if self._biases is None or self._counts is None:
            biases, counts = torch.zeros_like(scores[0]), torch.zeros_like(scores[0])
            if self._bias:
                tokens = torch.tensor(list(self._bias), device=scores.device)
                biases[tokens] = torch.tensor(list(self._bias.values())).to(scores)
            self._biases, self._counts = biases, counts  # only now: filling them may have failed
        new = input_ids[0, self._counted :]
        self._counts.scatter_add_(0, new, torch.ones_like(new, dtype=scores.dtype))
        self._counted = input_ids.shape[1]
        penalty = self._frequency * self._counts + self._presence * (self._counts > 0)
        return scores + (self._biases - penalty)


def check_bias(bias: Any, vocabulary: int) -> dict[int, float]:
    """The biases by token id, as numbers. Raises OptionError for unknown ids and biases over MOST_BIAS."""
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias is of type {type(bias).__name__}; it must map token ids to biases")
    checked = {}
    for token, value in bias.items():
        try:
            number = int(token)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < vocabulary:
            raise OptionError(f"logit_bias has {token!r}; it must be token ids, from 0 to {vocabulary - 1}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST_BIAS:
            raise OptionError(
                f"logit_bias of token {number} is {value!r}; it must be a number from "
                f"{-MOST_BIAS:g} to {MOST_BIAS:g}"
            )
        checked[number] = float(value)
    return checked
