"""What is typed by users of other programs (llama.cpp, Ollama, vLLM), and what it is called here."""

from __future__ import annotations

import click

COMMANDS = {
    "delete": "rm",
    "download": "pull",
    "generate": "run",
    "launch": "serve",
    "ps": "list",
    "quantize": "convert",
    "version": "--version",
}

_PLACED = "experts are placed by themselves, in as much as --vram allows"
_FLAGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("-m", "--model", "--hf-repo"), "model", "MODEL is given without a flag"),
    (("-p", "--prompt"), "prompt", "PROMPT is given without a flag, behind MODEL"),
    (("--ctx-size", "--num-ctx", "--max-model-len"), "context", "it is --context here"),
    (("--max-num-seqs",), "parallel", "it is --parallel here"),
    (("--served-model-name",), "alias", "it is --alias here"),
    (("--allowed-origins",), "cors", "it is --cors here"),
    (("--temp",), "temperature", "it is --temperature here"),
    (("--predict", "--n-predict", "--num-predict"), "max_tokens", "it is --max-tokens here"),
    (("--system-prompt",), "system", "it is --system here"),
    (("--gpu-layers", "--n-gpu-layers", "--n-cpu-moe", "--cpu-moe"), "vram", _PLACED),
)
"""Flags, the parameter of ours that stands for them, and what to do instead."""


def flag_hint(flag: str, command: click.Command | None) -> str | None:
    """What to do instead of giving the command this flag of another program; None if that is unknown."""
    ours = {parameter.name for parameter in command.params} if command is not None else set()
    return next((hint for names, name, hint in _FLAGS if flag in names and name in ours), None)
