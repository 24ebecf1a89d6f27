"""Measures a demo model and writes metrics.json: `python -m moe_local.demo.evaluate [DIR] [--write]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moe_local.demo.batches import USER_WEIGHT, Encoder
from moe_local.demo.corpus import Corpus
from moe_local.demo.documents import documents
from moe_local.demo.gate import BASIC, BLIND, OPEN
from moe_local.demo.routing import measure_routing
from moe_local.demo.scoring import Reply, score_table

MODEL_FOLDER = Path(__file__).parent / "model"
_CONVERSATIONS, _SEED = 200, "held out"  # training seeds its pools with "number/number", never with this
_WINDOW, _WINDOWS = 256, 60  # tokens of held-out documents


def measure(folder: Path, *, blind: bool) -> tuple[dict[str, Any], list[Reply]]:
    """(metrics, all scored replies) of the model in `folder`; the blind questions only if `blind`."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    corpus, encoder = Corpus(), Encoder(tokenizer)
    tables = {"basic": BASIC, "open": OPEN} | ({"blind": BLIND} if blind else {})
    replies = {name: score_table(model, tokenizer, corpus, table) for name, table in tables.items()}
    rng = random.Random(_SEED)
    chats = [encoder.conversation(corpus.conversation(rng)) for _ in range(_CONVERSATIONS)]
    stream = encoder.stream(documents()[1])[: _WINDOW * _WINDOWS]
    windows = [part.tolist() for part in stream.split(_WINDOW)]
    metrics = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "questions": {name: _questions(rows) for name, rows in replies.items()},
        "perplexity": _chat_perplexity(model, chats) | {"documents": _document_perplexity(model, windows)},
        "routing": {
            "chat": dataclasses.asdict(measure_routing(model, [ids for ids, _ in chats])),
            "documents": dataclasses.asdict(measure_routing(model, windows)),
        },
    }
    return metrics, [reply for rows in replies.values() for reply in rows]


def _questions(replies: list[Reply]) -> dict[str, int]:
    unknown = [reply for reply in replies if "unknown" in reply.accepted]
    known = [reply for reply in replies if "unknown" not in reply.accepted]
    return {
        "right": sum(reply.right for reply in replies),
        "of": len(replies),
        "in_scope_right": sum(reply.right for reply in known),
        "in_scope_of": len(known),
        "out_of_scope_right": sum(reply.right for reply in unknown),
        "out_of_scope_of": len(unknown),
    }


def _losses(model: MixtralForCausalLM, ids: list[int]) -> torch.Tensor:
    """Nats for each token of `ids` but the first."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, row[0, 1:], reduction="none")


def _chat_perplexity(
    model: MixtralForCausalLM, chats: list[tuple[list[int], list[float]]]
) -> dict[str, float]:
    """Perplexity of fresh conversations' answers and of their users' turns."""
    sums = {"answers": 0.0, "users": 0.0}
    counts = {"answers": 0, "users": 0}
    for ids, weights in chats:
        losses = _losses(model, ids)
        weight = torch.tensor(weights[1:])
        for part, chosen in (("answers", weight >= 1), ("users", weight == USER_WEIGHT)):
            sums[part] += float(losses[chosen].sum())
            counts[part] += int(chosen.sum())
    return {part: round(math.exp(sums[part] / counts[part]), 3) for part in sums}


def _document_perplexity(model: MixtralForCausalLM, windows: list[list[int]]) -> float:
    losses = [_losses(model, ids) for ids in windows]
    return round(math.exp(float(torch.cat(losses).mean())), 2)


def main(arguments: list[str] | None = None) -> None:
    """The command line: prints wrong answers, then the metrics as JSON."""
    parser = argparse.ArgumentParser(description="Measure a demo model.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL_FOLDER)
    parser.add_argument("--blind", action="store_true", help="ask the blind questions too, counted only")
    parser.add_argument(
        "--show", action="store_true", help="print every conversation, not only the wrong ones"
    )
    parser.add_argument("--write", action="store_true", help="write metrics.json into the folder")
    options = parser.parse_args(arguments)
    metrics, replies = measure(options.folder, blind=options.blind)
    blind = (
        {" / ".join(r.turns) for r in replies[-metrics["questions"]["blind"]["of"] :]}
        if options.blind
        else set()
    )
    for reply in replies:
        line = " / ".join(reply.turns)
        if (not reply.right and line not in blind) or options.show:
            print(f"{'right' if reply.right else 'WRONG'}  {line} -> {reply.answer}")
    text = json.dumps(metrics, indent=1) + "\n"
    print(text)
    if options.write:
        partial = options.folder / "metrics.json.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, options.folder / "metrics.json")


if __name__ == "__main__":
    main()
