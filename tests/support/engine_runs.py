"""Running an engine on random sequences, and checking them against the model."""

from __future__ import annotations

import random
from typing import Any

import torch

from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.sampling import Settings, make_settings
from moe_local.offload.engine.sequence import Sequence


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 320) for _ in range(length)]


def greedy(model: Any, count: int) -> Settings:
    return make_settings(model, [1], max_new_tokens=count, eos_token_id=None)


def finish(engine: Engine, *sequences: Sequence) -> None:
    """Step until these have all their tokens."""
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
        engine.check_integrity()


def answered_at_random(
    engine: Engine, waiting: list[list[int]], chance: random.Random, *, most: int
) -> list[Sequence]:
    """Let all `waiting` prompts join the engine at random times, sometimes reusing another's row, and leave,
    sometimes before they are finished; returns their sequences.

    Each is to get 1 to `most` new tokens; `waiting` is empty afterwards.
    """
    running: list[Sequence] = []
    done: list[Sequence] = []
    while waiting or running:
        if waiting and engine.free_rows and chance.random() < 0.4:
            settings = greedy(engine.hf, chance.randint(1, most))
            running.append(engine.join(waiting.pop(), settings, reuse=chance.random() < 0.7))
        engine.step()
        engine.check_integrity()
        for sequence in list(running):
            if sequence.finish_reason or chance.random() < 0.03:
                engine.leave(sequence)
                running.remove(sequence)
                done.append(sequence)
    return done


def check_alone(hf: Any, sequences: list[Sequence]) -> None:
    """Check that each sequence's tokens are the model's likeliest when it computes that sequence alone."""
    for sequence in sequences:
        with torch.inference_mode():
            logits = hf(input_ids=torch.tensor([sequence.ids[:-1] or sequence.ids])).logits[0]
        want = logits[sequence.prompt_len - 1 :].argmax(-1).tolist()
        assert sequence.new_ids == want[: len(sequence.new_ids)]
