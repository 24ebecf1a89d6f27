"""Trains the demo model from nothing on the CPU: `python -m moe_local.demo.train --out DIR`.

The schedule is counted in tokens, so the same arguments give the same batches on any machine.  A run that was
interrupted goes on with `--resume`; `--init DIR` starts a second stage from a finished model.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_local.demo.batches import OPENING_WEIGHT, Batch, Batches
from moe_local.demo.corpus import Corpus
from moe_local.demo.network import RouterLosses, build_model, grouped_experts, save_model
from moe_local.demo.tokenizer import PAD, train_tokenizer

_WARM_UP_STEPS = 100
_FINAL_RATE = 0.02  # of the peak
_EARLY_SHARE = 0.15  # of the tokens: mostly single turns with whole answers
_BALANCE, _Z = 0.01, 1e-3
_REPORT_STEPS = 25


@dataclass(frozen=True, slots=True)
class Options:
    """What a run depends on; `tokens`, `batch_tokens` and `seed` decide its batches."""

    out: Path
    tokens: int = 4_000_000
    batch_tokens: int = 2048
    rate: float = 2e-3
    seed: int = 0
    threads: int = 1
    save_minutes: float = 5.0
    minutes: float | None = None
    init: Path | None = None
    resume: bool = False


@dataclass(slots=True)
class Progress:
    """How far a run is: steps, tokens (padding included), the pool in use and batches taken of it."""

    step: int = 0
    tokens: int = 0
    pool: int = 0
    batch: int = 0
    opening: float = 6.0  # running mean loss of the answers' first tokens, nats


class Trainer:
    """One training run: model, optimizer, batches and progress."""

    def __init__(self, options: Options) -> None:
        self.options = options
        corpus = Corpus()
        # The tokenizer follows from the wordings; a run keeps its own even if they have changed since.
        known = options.out if options.resume else options.init
        if known:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(known)
            self.model = MixtralForCausalLM.from_pretrained(known, dtype=torch.float32)
        else:
            self.tokenizer = train_tokenizer(corpus, options.seed)
            self.model = build_model(options.seed)
        self.model.train()
        self.router_losses = RouterLosses(self.model)
        named = list(self.model.named_parameters())
        plain = [w for name, w in named if w.dim() < 2 or name.endswith("gate.weight")]
        decayed = [w for name, w in named if not (w.dim() < 2 or name.endswith("gate.weight"))]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=options.rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.batches = Batches(corpus, self.tokenizer, options.seed, options.batch_tokens)
        self.progress = Progress()
        if options.resume:
            self._load_state()

    @property
    def _state_file(self) -> Path:
        return self.options.out / "training.pt"

    def _load_state(self) -> None:
        state = torch.load(self._state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Writes the model folder and, beside it, what `--resume` needs."""
        save_model(self.model, self.tokenizer, self.options.out)
        done = self.progress
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {name: getattr(done, name) for name in Progress.__slots__},
        }
        partial = self._state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._state_file)

    def run(self) -> Progress:
        """Trains until the tokens (or minutes) are used up and saves; returns how far it came."""
        options, done = self.options, self.progress
        begun = saved = time.monotonic()
        start_tokens = done.tokens
        while done.tokens < options.tokens:
            early = not options.init and done.tokens < _EARLY_SHARE * options.tokens
            for index, batch in enumerate(self.batches.pool(done.pool, early=early)):
                if index < done.batch:  # taken before the interruption
                    continue
                self._step(batch)
                done.batch = index + 1
                now = time.monotonic()
                if done.step % _REPORT_STEPS == 0:
                    speed = (done.tokens - start_tokens) / (now - begun)
                    print(
                        f"step {done.step} tokens {done.tokens} opening {done.opening:.3f} {speed:.0f} tok/s",
                        flush=True,
                    )
                if now - saved > 60 * options.save_minutes:
                    self.save()
                    saved = now
                out_of_time = options.minutes is not None and now - begun > 60 * options.minutes
                if done.tokens >= options.tokens or out_of_time:
                    self.save()
                    return done
            done.pool, done.batch = done.pool + 1, 0
        return done

    def _step(self, batch: Batch) -> None:
        """One optimizer step; updates the progress."""
        done = self.progress
        share = done.tokens / self.options.tokens
        warm = 1.0 if self.options.init and done.step > 20 else min(1.0, (done.step + 1) / _WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * warm * max(_FINAL_RATE, 1 - share)
        hidden = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        weights = batch.weights[:, 1:].reshape(-1)
        counted = weights > 0
        weights = weights[counted]
        logits = self.model.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1])[counted])
        losses = functional.cross_entropy(logits, batch.ids[:, 1:].reshape(-1)[counted], reduction="none")
        balance, z = self.router_losses.take((batch.ids.reshape(-1) != PAD).float())
        loss = (losses * weights).sum() / weights.sum() + _BALANCE * balance + _Z * z
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done.step += 1
        done.tokens += batch.ids.numel()
        opening = losses[weights == OPENING_WEIGHT]
        if len(opening):
            done.opening += 0.05 * (opening.mean().item() - done.opening)


def train(options: Options) -> Progress:
    """Runs the training that `options` describe with the fast experts; returns how far it came."""
    torch.set_num_threads(options.threads)
    plain = MixtralExperts.forward
    MixtralExperts.forward = grouped_experts
    try:
        return Trainer(options).run()
    finally:
        MixtralExperts.forward = plain


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    defaults = Options(Path())
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the training state")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="length of the schedule")
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens)
    parser.add_argument("--rate", type=float, default=defaults.rate, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--save-minutes", type=float, default=defaults.save_minutes)
    parser.add_argument("--minutes", type=float, help="stop after so many minutes even if tokens are left")
    parser.add_argument("--init", type=Path, help="start from this model instead of from nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    done = train(Options(**vars(parser.parse_args(arguments))))
    print(f"trained {done.step} steps, {done.tokens} tokens")


if __name__ == "__main__":
    main()
