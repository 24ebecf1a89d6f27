"""Sequences that are continued together, for decode.py --parallel: what a step takes and has to read.

Ours goes through the engine as `moe-local serve --parallel` does: prompts are submitted at once to the
model's batcher, which computes one after the other and between them steps what has begun. llama.cpp computes
the prompts one after the other, and then decodes all sequences in one batch a step, each with a seq_id of its
own (peers/llama_cpp_batch.py). Prompts differ in text and in length: in equal steps from half of
--prompt-tokens to all of them. Only steps in which all N sequences take part are timed, from the last first
id on.
  ms/step   the median over rounds, with the lowest and highest
  experts   different experts of a step, summed over layers. Ours are counted by the store in the timed steps;
            llama.cpp's are its own routers' choices, when the first round is computed again, untimed
  floor     the dense part and these experts, read once each, at the best bandwidth of RAM in the run
  alone     sequences of the first round whose ids are those that they have when each is answered alone
"""

from __future__ import annotations

import queue
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contenders import Configuration, Contender, spread
from peers.client import Peer
from ratio import Ratio

import moe_local
from moe_local.offload.batcher import Ended
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.records import Token

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Steps:
    """What N sequences were given together in `steps` steps. `ids` by sequence, as many for each, including
    the first, which came with the prompt; `seconds` of all steps."""

    ids: tuple[tuple[int, ...], ...]
    seconds: float
    steps: int

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def tokens_per_s(self) -> float:
        return len(self.ids) * self.steps / self.seconds


class Together(ABC):
    """A contender of decode.py that continues `count` sequences at once. `rounds` holds what counts."""

    def __init__(self, contender: Contender, count: int, experts_per_token: int) -> None:
        """`experts_per_token`: how many a token uses, summed over layers."""
        self.contender = contender
        self.count = count
        self.name = f"{contender.name}, {count} sequences"
        self.rounds: list[Steps] = []
        self._expert_bytes = contender.weights.expert_bytes / experts_per_token

    def run(self, prompts: Sequence[Ids], tokens: int, *, keep: bool) -> None:
        """Continue the prompts greedily with `tokens` ids each; if `keep`, append to `rounds`. A run that is
        not kept counts and compares what would take time in the others."""
        steps = self._steps(prompts, tokens, first=not keep)
        if keep:
            self.rounds.append(steps)

    @abstractmethod
    def _steps(self, prompts: Sequence[Ids], tokens: int, *, first: bool) -> Steps: ...

    @property
    @abstractmethod
    def experts(self) -> float:
        """Different experts of a step, summed over layers: the mean."""

    def summary(self, bandwidths: Bandwidths) -> dict[str, Any]:
        ms = [steps.ms_per_step for steps in self.rounds]
        read = self.contender.weights.dense_bytes + self.experts * self._expert_bytes
        floor = 1000 * read / bandwidths.ram
        return {
            "name": self.name,
            "sequences": self.count,
            "ms_per_step": spread(ms),
            "tokens_per_s": spread([steps.tokens_per_s for steps in self.rounds]),
            "experts_per_step": self.experts,
            "read_bytes_per_step": read,
            "floor_ms_per_step": floor,
            "share_of_floor": floor / statistics.median(ms),
        }


class OursTogether(Together):
    """moe-local through its batcher. Does not own the model."""

    def __init__(self, configuration: Configuration, count: int) -> None:
        super().__init__(configuration, count, experts_per_token(configuration.model))
        self.configuration = configuration
        self._model = configuration.model
        self._counted: list[float] = []
        self.alone: int | None = None
        """How many sequences of the first round had the ids that they have alone."""

    def _steps(self, prompts: Sequence[Ids], tokens: int, *, first: bool) -> Steps:
        self._model.parts.engine.forget()  # nothing of a prompt may be known from before
        heard = self._hear(prompts, tokens)
        ids = tuple(tuple(token.id for _, token in each)[:tokens] for each in heard)
        last = max(heard, key=lambda each: each[0][0])[:tokens]
        if first:
            self.alone = sum(self._alone(*pair, tokens) for pair in zip(prompts, ids, strict=True))
        else:
            counts = [token.hits + token.misses for _, token in last[1:]]
            self._counted.append(statistics.fmean(counts))
        return Steps(ids, last[-1][0] - last[0][0], tokens - 1)

    def _hear(self, prompts: Sequence[Ids], tokens: int) -> list[list[tuple[float, Token]]]:
        """Each sequence's tokens and when they came. Each goes on until the one that began last has its own,
        since sequences that have begun take a step between two prompts."""
        heard: list[list[tuple[float, Token]]] = [[] for _ in prompts]
        ends: queue.SimpleQueue[Ended] = queue.SimpleQueue()

        def listener(mine: list[tuple[float, Token]]) -> Any:
            def hear(event: Token | Ended) -> None:
                if isinstance(event, Token):
                    mine.append((time.perf_counter(), event))
                else:
                    ends.put(event)

            return hear

        batcher = self._model.batcher()
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
        for prompt, mine in zip(prompts, heard, strict=True):
            most = tokens + len(prompts)
            self._model.submit(batcher, list(prompt), listener(mine), max_new_tokens=most, **options)
        ended = [ends.get() for _ in prompts]
        batcher.close()
        for end in ended:
            if end.error is not None:
                raise SystemExit(str(end.error))
        return heard

    def _alone(self, prompt: Ids, together: Ids, tokens: int) -> bool:
        self._model.parts.engine.forget()
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
        with self._model.stream(list(prompt), max_new_tokens=tokens, **options) as stream:
            return [token.id for token in stream] == list(together)

    @property
    def experts(self) -> float:
        return statistics.fmean(self._counted)

    def summary(self, bandwidths: Bandwidths) -> dict[str, Any]:
        about = {"activations": self.configuration.activations, "as_alone": self.alone}
        return {**super().summary(bandwidths), **about}


class PeerTogether(Together):
    """llama.cpp, as a peer that was started for several sequences."""

    def __init__(self, peer: Peer, count: int, experts_per_token: int) -> None:
        super().__init__(peer, count, experts_per_token)
        self._peer = peer
        self._experts = 0.0

    def _steps(self, prompts: Sequence[Ids], tokens: int, *, first: bool) -> Steps:
        record = self._peer.ask([list(prompt) for prompt in prompts], tokens, review=first)
        if first:
            self._experts = record["review"]["experts_per_step"]
        return Steps(tuple(zip(*record["ids"], strict=True)), record["decode_s"], tokens - 1)

    @property
    def experts(self) -> float:
        return self._experts


def experts_per_token(model: moe_local.Model) -> int:
    """How many experts a token uses, summed over layers."""
    return sum(layer.top_k for layer in model.plan.request.spec.layers)


def lengths(count: int, longest: int) -> list[int]:
    """The lengths of `count` prompts: in equal steps up to `longest`, from half of it on."""
    return [longest - (longest // 2) * (count - 1 - i) // max(1, count - 1) for i in range(count)]


def ratio(ours: Together, peer: Together) -> dict[str, Any]:
    """Ratios of tokens per second, ours over the peer's, paired by round."""
    speeds = [[steps.tokens_per_s for steps in each.rounds] for each in (ours, peer)]
    return {"ours": ours.name, "peer": peer.name, "decode": Ratio.of(*speeds).to_dict()}


def print_table(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'':54} {'experts':>7} {'MB/step':>7} {'ms/step':>8} {'min':>7} {'max':>7} {'tok/s':>6} "
        f"{'floor':>6} {'share':>6} {'alone':>6}"
    )
    for row in rows:
        ms, alone = row["ms_per_step"], row.get("as_alone")
        print(
            f"{row['name']:54} {row['experts_per_step']:7.1f} {row['read_bytes_per_step'] / 1e6:7.0f} "
            f"{ms['median']:8.1f} {ms['min']:7.1f} {ms['max']:7.1f} {row['tokens_per_s']['median']:6.1f} "
            f"{row['floor_ms_per_step']:6.1f} {row['share_of_floor']:6.1%} "
            f"{'' if alone is None else f'{alone} of ' + str(row['sequences']):>6}"
        )
    for row in ratios:
        print(f"{row['ours']} / {row['peer']}: decode {Ratio(**row['decode'])}")
