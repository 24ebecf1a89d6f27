"""What all benchmarks share: arguments, rounds, and the JSON object that they print at the end."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import moe_local
from moe_local.cache.files import write_atomically


def parser_of(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with --json and, if `rounds` gives its default, --rounds. Its description is the first line of
    the benchmark's docstring `doc`: the question that it answers."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"that count; default {rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser


def cuda_device(name: str) -> torch.device:
    """The current CUDA device. Without one, ends the process with one line that names the script."""
    if not torch.cuda.is_available():
        sys.exit(f"{name} needs a CUDA device, and torch finds none")
    return torch.device("cuda", torch.cuda.current_device())


def in_rounds(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call all measures in turn in each round; returns the values of each, by round. One more round comes
    first to warm up and does not count."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                found[name].append(value)
    return found


def finish(result: Mapping[str, Any], path: Path | None) -> None:
    """Print the object as the last line, and also write it to `path` unless that is None."""
    if path is not None:
        write_atomically(path, [json.dumps(result, indent=1), "\n"])
    print(json.dumps(result))


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_local": moe_local.__version__,
    }
