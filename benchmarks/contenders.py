"""The contenders of decode.py: what each reads for a token, its answers, and how long they took."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import moe_local
from moe_local.offload.measure.floor import Weights, planned_weights
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.records import GenerationStats


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one prompt, with the seconds to the first new id, and from there to the last."""

    prompt_tokens: int
    prefill_s: float
    decode_s: float
    ids: tuple[int, ...]

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.decode_s / (len(self.ids) - 1)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s


class Contender(ABC):
    """Something that answers prompts. `answers` holds those of the counted rounds, in order."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.name = name
        self.weights = weights
        self.answers: list[Answer] = []

    @abstractmethod
    def answer(self, prompt: Sequence[int], tokens: int, *, keep: bool) -> None:
        """Answer greedily with exactly `tokens` ids; if `keep`, append it to `answers`."""

    def floor_s(self, bandwidths: Bandwidths) -> float:
        """The least time of a token by the bytes it reads; in this class all come from RAM."""
        return self.weights.nbytes / bandwidths.ram

    def summary(self, bandwidths: Bandwidths) -> dict[str, Any]:
        """Figures over the answers; milliseconds and bytes are those of a decoded token."""
        ms = [answer.ms_per_token for answer in self.answers]
        floor = 1000 * self.floor_s(bandwidths)
        return {
            "name": self.name,
            "weights": asdict(self.weights),
            "bits_per_weight": self.weights.bits(),
            "read_bytes_per_token": self.weights.nbytes,
            "ms_per_token": spread(ms),
            "floor_ms_per_token": floor,
            "share_of_floor": floor / statistics.median(ms),
            "prefill_tokens_per_s": spread([answer.prefill_tokens_per_s for answer in self.answers]),
        }


class Configuration(Contender):
    """moe-local with one set of options. Does not own the model."""

    def __init__(
        self,
        model: moe_local.Model,
        *,
        slots: int | None,
        prefetch: str,
        activations: str,
        miss: str = "auto",
        policy: str = "adaptive",
    ) -> None:
        name = f"{slots or 'all that fit'} slots, prefetch {prefetch}, {activations}"
        if model.hf.device.type != "cpu":
            name += f", miss {miss}"
        if policy != "adaptive":
            name += f", {policy}"
        super().__init__(name, planned_weights(model.plan))
        self.miss = miss
        self.policy = policy
        self.but_policy = (slots, prefetch, activations, miss)
        self.model = model
        self.prefetch = prefetch
        self.activations = activations
        self.runs: list[GenerationStats] = []

    def answer(self, prompt: Sequence[int], tokens: int, *, keep: bool) -> None:
        with self.model.stream(
            list(prompt), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        ) as stream:
            for _ in stream:
                pass
        stats = stream.stats
        if keep:
            self.runs.append(stats)
            ids = tuple(stream.token_ids)
            self.answers.append(Answer(len(prompt), stats.ttft_s, stats.decode_s, ids))

    def floor_s(self, bandwidths: Bandwidths) -> float:
        """The weights are read once from the fastest tier, and misses once over their links; these overlap,
        so the slowest decides."""
        fastest = bandwidths.ram if self.model.plan.request.vram is None else bandwidths.vram
        moved = self._moved_per_token()
        return max(
            self.weights.nbytes / fastest, moved["h2d"] / bandwidths.h2d, moved["disk"] / bandwidths.disk
        )

    def summary(self, bandwidths: Bandwidths) -> dict[str, Any]:
        runs, tokens = self.runs, self._tokens
        return {
            **super().summary(bandwidths),
            "mode": self.model.plan.mode,
            "slots": self.model.plan.to_dict()["slots"],
            "prefetch": self.prefetch,
            "activations": self.activations,
            "miss": self.miss,
            "policy": self.policy,
            "ttft_s": statistics.median(run.ttft_s for run in runs),
            "hit_rate": sum(r.hits for r in runs) / max(1, sum(r.hits + r.misses for r in runs)),
            "stall_ms_per_token": 1000 * sum(run.stall_s for run in runs) / tokens,
            "bytes_per_token": self._moved_per_token(),
        }

    @property
    def _tokens(self) -> int:
        return sum(run.new_tokens for run in self.runs)

    def _moved_per_token(self) -> dict[str, float]:
        counted = [run.counts.bytes for run in self.runs]
        return {
            "h2d": sum(moved.h2d for moved in counted) / self._tokens,
            "disk": sum(moved.disk for moved in counted) / self._tokens,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
