"""The frame of a benchmark: its arguments, rounds, and the one JSON object that it ends with."""

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
    """A parser whose description is the question that a benchmark asks, with --json and, if told how many
    there are by default, --rounds."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"that count; default {rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser


def cuda_device(name: str) -> torch.device:
    """The current CUDA device. Ends the process with one line where the script of this name finds none."""
    if not torch.cuda.is_available():
        sys.exit(f"{name} needs a CUDA device, and torch finds none")
    return torch.device("cuda", torch.cuda.current_device())


def in_rounds(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measured, by rounds in which all have their turn. The first warms up and does not count."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                found[name].append(value)
    return found


def finish(result: Mapping[str, Any], path: Path | None) -> None:
    """Print the object as the last line, and write it to `path`, if there is one."""
    if path is not None:
        write_atomically(path, [json.dumps(result, indent=1), "\n"])
    print(json.dumps(result))


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_local": moe_local.__version__,
    }
