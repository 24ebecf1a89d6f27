"""The names that moe-local knows: aliases of models on the Hugging Face Hub, and the demo in the package."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError, ModelNotFoundError

DEMO = "demo"
"""The small model in the package."""


@dataclass(frozen=True, slots=True)
class ModelAlias:
    """A short name of a Hub repository whose config.json the package carries.

    `checkpoint_bytes` is what its safetensors hold; `parameters` counts every weight, also the inactive ones.
    """

    alias: str
    repo_id: str
    summary: str
    parameters: int
    checkpoint_bytes: int

    def config(self) -> Any:
        """transformers' config of the published model, without network."""
        from moe_local.offload.checkpoint.checkpoint import parse_config

        with importlib.resources.as_file(_carried_configs() / f"{self.alias}.json") as path:
            return parse_config(path)


def _alias(alias: str, repo_id: str, summary: str, parameters: int) -> ModelAlias:
    """All of them are published in bf16."""
    return ModelAlias(alias, repo_id, summary, parameters, 2 * parameters)


ALIASES: dict[str, ModelAlias] = {
    entry.alias: entry
    for entry in (
        _alias(
            "mixtral-8x7b",
            "mistralai/Mixtral-8x7B-Instruct-v0.1",
            "the standard case: 8 experts a layer, 2 per token; a 24 GB card",
            46_702_792_704,
        ),
        _alias(
            "mixtral-8x22b",
            "mistralai/Mixtral-8x22B-Instruct-v0.1",
            "the large Mixtral; 48 GB of VRAM or much RAM",
            140_630_071_296,
        ),
        _alias(
            "qwen3-30b-a3b",
            "Qwen/Qwen3-30B-A3B",
            "128 small experts a layer, 8 per token; an 8 to 16 GB card",
            30_532_122_624,
        ),
        _alias(
            "qwen3-coder-30b-a3b",
            "Qwen/Qwen3-Coder-30B-A3B-Instruct",
            "as qwen3-30b-a3b, for code, 262144 tokens of context",
            30_532_122_624,
        ),
        _alias(
            "qwen3-235b-a22b",
            "Qwen/Qwen3-235B-A22B",
            "the large Qwen3; from RAM or disk",
            235_093_634_560,
        ),
        _alias(
            "olmoe-1b-7b",
            "allenai/OLMoE-1B-7B-0924-Instruct",
            "open in data and code; 64 experts a layer, 8 per token",
            6_919_161_856,
        ),
        _alias(
            "qwen1.5-moe-a2.7b",
            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
            "60 experts a layer and a shared one; a small start",
            14_315_784_192,
        ),
    )
}


def find_alias(name: str) -> ModelAlias | None:
    """The alias called `name`, in any case."""
    return ALIASES.get(name.strip().lower())


def hub_id(name: str) -> str | None:
    """org/name from a Hub id or the address of a model page; None if it is neither."""
    name = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/", "", name.strip())
    name = re.sub(r"/(tree|blob)/main/?.*$", "", name).rstrip("/")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) else None


def short_name(name: str) -> str:
    """One name for a model however it was called: its alias, else its Hub id, else its folder's name.

    So that mixtral-8x7b, Mixtral-8x7B and mistralai/Mixtral-8x7B-Instruct-v0.1 share one conversion.
    """
    name = name.strip()
    alias = find_alias(name)
    if alias is not None or name.lower() == DEMO:
        return alias.alias if alias is not None else DEMO
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve().name
    repo_id = hub_id(name) or name
    return next((e.alias for e in ALIASES.values() if e.repo_id.lower() == repo_id.lower()), repo_id)


def demo_folder() -> Path:
    """The folder of the demo model. Raises ModelNotFoundError in a checkout where it was never trained."""
    folder = Path(str(importlib.resources.files("moe_local.demo"))) / "model"
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the demo model is not in {folder}; install moe-local again")
    return folder


def near_matches(name: str) -> list[str]:
    """Known names that look like `name`, nearest first; at most three."""
    wanted = name.strip().lower()
    by_repo = {entry.repo_id.lower(): entry.alias for entry in ALIASES.values()}
    by_repo |= {entry.repo_id.lower().partition("/")[2]: entry.alias for entry in ALIASES.values()}
    candidates = [*ALIASES, DEMO, *by_repo]
    found = [by_repo.get(match, match) for match in difflib.get_close_matches(wanted, candidates, 6, 0.5)]
    found += [alias for alias in ALIASES if wanted and (alias.startswith(wanted) or wanted in alias)]
    return list(dict.fromkeys(found))[:3]


def not_found(name: str, reason: str) -> ModelNotFoundError:
    """The error for a model that is not there: what, why, and the names that were perhaps meant."""
    near = near_matches(name)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join([DEMO, *ALIASES])}"
    return ModelNotFoundError(f"model {name!r} not found: {reason}; {hint}")


def _carried_configs() -> Any:
    folder = importlib.resources.files("moe_local.offload.checkpoint") / "configs"
    if not folder.is_dir():
        raise CheckpointError("the package lacks its model configs; install moe-local again")
    return folder
