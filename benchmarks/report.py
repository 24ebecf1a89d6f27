"""The frame of a benchmark: its arguments, the machine, and the one JSON object that it ends with."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import moe_local
from moe_local.cache.files import write_atomically
from moe_local.offload.plan import bandwidth


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose description is the question that a benchmark asks, and the flag --json."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser


def with_rounds(parser: argparse.ArgumentParser, rounds: int) -> argparse.ArgumentParser:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    return parser


def need_cuda(doc: str | None = None) -> torch.device:
    """The current CUDA device; ends the process with one line where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name} needs a CUDA device, and torch finds none")
    return torch.device("cuda", torch.cuda.current_device())


def finish(result: Mapping[str, Any], path: Path | str | None) -> None:
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


def machine(**more: Any) -> dict[str, Any]:
    """What figures depend on, in the words that the planner keeps bandwidths by."""
    return {"machine": bandwidth.machine(), "threads": torch.get_num_threads(), **more, **versions()}
