"""The peer's end of the pipe: one JSON line in for each prompt, one line out for its answer.

A peer has its own process and environment, so this module uses only the standard library. The lines:

    out   {"name", "version", "detail", "threads", "weights": {"expert_bytes", "expert_numel", "dense_bytes",
          "dense_numel"}}, once, when the model is loaded (see `Weights` in benchmarks/contenders.py)
    in    {"prompt": [id, ...], "tokens": N, "review": whether to add the answer's review}
    out   {"prefill_s", "decode_s", "ids": [N ids], "figures": {name: count since the first id},
          "review": {name: figure}, if it was asked for and the peer has any}

A peer of several sequences takes a list of prompts instead, and gives a list of N steps of one id each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

First = Callable[[Any], Any]
"""Computes a prompt (or prompts) from an empty context, and returns the likeliest next id (of each)."""
Next = Callable[[Any], Any]
"""Computes one more id in the same context (for each), and returns the likeliest next one (of each)."""
Figures = Callable[[], dict[str, float]]
"""Returns counts since the start of the process, by name."""
Review = Callable[[Any, list[Any]], dict[str, float]]
"""Looks at an answer again, given its prompt and ids, to find out what would take time in measuring it."""


class Pipe:
    """The pipe to the benchmark. To be made before the model is loaded: it takes stdout for itself and sends
    what libraries print there to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def serve(
        self,
        hello: dict[str, Any],
        first: First,
        following: Next,
        figures: Figures | None = None,
        review: Review | None = None,
    ) -> None:
        """Answer until the other end closes the pipe. `figures`: by default the bytes read from disk."""
        self._send(hello)
        for line in sys.stdin:
            request = json.loads(line)
            prompt = request["prompt"]
            record = measure(prompt, request["tokens"], first, following, figures or of_process)
            if review is not None and request["review"]:
                record["review"] = review(prompt, record["ids"])
            self._send(record)

    def _send(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._out, flush=True)


def measure(prompt: Any, tokens: int, first: First, following: Next, figures: Figures) -> dict[str, Any]:
    """Answer a prompt with `tokens` ids, timing up to the first new id and from there to the last."""
    began = time.perf_counter()
    ids = [first(prompt)]
    before = figures()
    answered = time.perf_counter()
    while len(ids) < tokens:
        ids.append(following(ids[-1]))
    ended = time.perf_counter()
    counted = {name: value - before[name] for name, value in figures().items()}
    return {"prefill_s": answered - began, "decode_s": ended - answered, "ids": ids, "figures": counted}


def of_process() -> dict[str, float]:
    return {"read_bytes": read_bytes()}


def read_bytes() -> int:
    """Bytes that the system has read from disk for this process, mapped files included; 0 if unknown."""
    try:
        with open("/proc/self/io") as file:
            return int(dict(line.split(": ") for line in file)["read_bytes"])
    except (OSError, KeyError):
        return 0
