"""The names that moe-local knows: aliases of models on the Hugging Face Hub, and the demo in the package."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError, ModelNotFoundError
from moe_local.offload.modeling.configs import make_config

DEMO = "demo"
"""The small model in the package."""

SOME = 6
"""How many known names an error lists if none resembles the given one."""


@dataclass(frozen=True, slots=True)
class ModelAlias:
    """A short name of a Hub repository whose config.json the package carries.

    `parameters` counts all weights that are loaded, active or not. Vision towers and layers for multi-token
    prediction do not count. `stored` is the format in which the publisher stores most of the weights.
    """

    alias: str
    repo_id: str
    summary: str
    parameters: int
    stored: str = "bf16"

    def config(self) -> Any:
        """transformers' config of the published model, without network."""
        return make_config(json.loads((_carried_configs() / f"{self.alias}.json").read_text()))


ALIASES: dict[str, ModelAlias] = {
    entry.alias: entry
    for entry in (
        ModelAlias(
            "mixtral-8x7b",
            "mistralai/Mixtral-8x7B-Instruct-v0.1",
            "the standard case: 8 experts a layer, 2 per token; a 24 GB card",
            46_702_792_704,
        ),
        ModelAlias(
            "mixtral-8x22b",
            "mistralai/Mixtral-8x22B-Instruct-v0.1",
            "the large Mixtral; 48 GB of VRAM or much RAM",
            140_630_071_296,
        ),
        ModelAlias(
            "qwen3-30b-a3b",
            "Qwen/Qwen3-30B-A3B",
            "128 small experts a layer, 8 per token; an 8 to 16 GB card",
            30_532_122_624,
        ),
        ModelAlias(
            "qwen3-coder-30b-a3b",
            "Qwen/Qwen3-Coder-30B-A3B-Instruct",
            "as qwen3-30b-a3b, for code, 262144 tokens of context",
            30_532_122_624,
        ),
        ModelAlias(
            "qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "the large Qwen3; from RAM or disk", 235_093_634_560
        ),
        ModelAlias(
            "qwen3-next-80b-a3b",
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "512 experts a layer, 10 per token, linear attention; long contexts",
            79_674_391_296,
        ),
        ModelAlias(
            "qwen3.5-35b-a3b",
            "Qwen/Qwen3.5-35B-A3B",
            "256 small experts a layer, 8 per token, linear attention; its text",
            34_660_610_688,
        ),
        ModelAlias("qwen3.6-35b-a3b", "Qwen/Qwen3.6-35B-A3B", "as qwen3.5-35b-a3b, newer", 34_660_610_688),
        ModelAlias(
            "qwen1.5-moe-a2.7b",
            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
            "60 experts a layer and a shared one; a small start",
            14_315_784_192,
        ),
        ModelAlias(
            "qwen2-57b-a14b",
            "Qwen/Qwen2-57B-A14B-Instruct",
            "64 experts a layer and a large shared one",
            57_408_658_944,
        ),
        ModelAlias(
            "deepseek-v2-lite",
            "deepseek-ai/DeepSeek-V2-Lite-Chat",
            "64 experts a layer, 6 per token, latent attention; an 8 GB card",
            15_706_484_224,
        ),
        ModelAlias(
            "deepseek-v2",
            "deepseek-ai/DeepSeek-V2-Chat",
            "160 experts a layer, latent attention; from RAM or disk",
            235_741_434_880,
        ),
        ModelAlias(
            "deepseek-v3",
            "deepseek-ai/DeepSeek-V3",
            "256 experts a layer, 8 per token; from disk",
            671_026_404_352,
            "fp8",
        ),
        ModelAlias(
            "deepseek-r1", "deepseek-ai/DeepSeek-R1", "as deepseek-v3, reasoning", 671_026_404_352, "fp8"
        ),
        ModelAlias(
            "deepseek-v3.2",
            "deepseek-ai/DeepSeek-V3.2",
            "as deepseek-v3, with sparse attention",
            671_877_929_216,
            "fp8",
        ),
        ModelAlias(
            "deepseek-v4-flash",
            "deepseek-ai/DeepSeek-V4-Flash",
            "256 experts a layer, 6 per token, a million tokens of context",
            284_332_230_231,
            "fp4",
        ),
        ModelAlias(
            "deepseek-v4-pro",
            "deepseek-ai/DeepSeek-V4-Pro",
            "the large DeepSeek V4; from disk",
            1_572_997_179_491,
            "fp4",
        ),
        ModelAlias(
            "llama-4-scout",
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "16 large experts a layer, 1 per token, and a shared one; its text",
            107_769_861_120,
        ),
        ModelAlias(
            "llama-4-maverick",
            "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
            "128 large experts in every other layer; its text",
            400_711_848_960,
        ),
        ModelAlias(
            "gemma-4-26b-a4b",
            "google/gemma-4-26B-A4B-it",
            "128 small experts a layer, 8 per token; its text; an 8 to 16 GB card",
            25_233_141_760,
        ),
        ModelAlias(
            "gpt-oss-20b",
            "openai/gpt-oss-20b",
            "32 experts a layer, 4 per token; an 8 to 16 GB card",
            20_914_757_184,
            "mxfp4",
        ),
        ModelAlias(
            "gpt-oss-120b",
            "openai/gpt-oss-120b",
            "128 experts a layer, 4 per token; a 24 GB card and RAM",
            116_829_156_672,
            "mxfp4",
        ),
        ModelAlias(
            "glm-4.5",
            "zai-org/GLM-4.5",
            "160 experts a layer, 8 per token, and a shared one; from disk",
            352_797_814_784,
        ),
        ModelAlias(
            "glm-4.6", "zai-org/GLM-4.6", "as glm-4.5, newer, 202752 tokens of context", 352_797_814_784
        ),
        ModelAlias(
            "glm-4.5-air",
            "zai-org/GLM-4.5-Air",
            "the smaller GLM-4.5; a 24 GB card and 64 GB of RAM",
            106_852_245_504,
        ),
        ModelAlias(
            "glm-4.7-flash",
            "zai-org/GLM-4.7-Flash",
            "64 small experts a layer, 4 per token, latent attention; an 8 to 16 GB card",
            29_943_390_976,
        ),
        ModelAlias(
            "olmoe-1b-7b",
            "allenai/OLMoE-1B-7B-0924-Instruct",
            "open in data and code; 64 experts a layer, 8 per token",
            6_919_161_856,
        ),
        ModelAlias(
            "phi-3.5-moe",
            "microsoft/Phi-3.5-MoE-instruct",
            "16 experts a layer, 2 per token; a 16 to 24 GB card",
            41_873_153_344,
        ),
        ModelAlias(
            "granite-3.1-3b-a800m",
            "ibm-granite/granite-3.1-3b-a800m-instruct",
            "40 small experts a layer, 8 per token; any machine",
            3_298_793_472,
        ),
        ModelAlias(
            "minimax-m2",
            "MiniMaxAI/MiniMax-M2",
            "256 experts a layer, 8 per token; from RAM or disk",
            228_689_748_992,
            "fp8",
        ),
        ModelAlias(
            "ernie-4.5-21b-a3b",
            "baidu/ERNIE-4.5-21B-A3B-PT",
            "64 experts a layer, 6 per token, and two shared ones; an 8 GB card",
            21_825_437_888,
        ),
        ModelAlias(
            "jamba-1.5-mini",
            "ai21labs/AI21-Jamba-Mini-1.5",
            "16 experts in every other layer, 2 per token, Mamba between",
            51_570_323_328,
        ),
        ModelAlias(
            "nemotron-3-nano-30b-a3b",
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "128 small experts in 23 layers, 6 per token, Mamba between; reasoning",
            31_577_937_344,
        ),
        ModelAlias(
            "lfm2-8b-a1b",
            "LiquidAI/LFM2-8B-A1B",
            "32 small experts a layer, 4 per token, convolutions; a small start",
            8_339_929_856,
        ),
        ModelAlias(
            "switch-base-8",
            "google/switch-base-8",
            "an encoder-decoder that fills gaps in text; 8 experts, 1 per token",
            619_339_008,
            "fp32",
        ),
    )
}


def find_alias(name: str) -> ModelAlias | None:
    """The alias called `name` in upper or lower case, or None."""
    return ALIASES.get(name.strip().lower())


def hub_id(name: str) -> str | None:
    """org/name from a Hub id or the address of a model page; None if it is neither."""
    name = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/", "", name.strip())
    name = re.sub(r"/(tree|blob)/main/?.*$", "", name).rstrip("/")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) else None


def short_name(name: str) -> str:
    """The same name for a model whatever the user calls it: its alias, else its folder's name or Hub id.

    So mixtral-8x7b, Mixtral-8x7B and mistralai/Mixtral-8x7B-Instruct-v0.1 share one conversion.
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
    """The error for a model that was not found, with the reason and names that the user may have meant."""
    near = near_matches(name)
    hint = f"did you mean {' or '.join(near)}?"
    if not near:
        names = [DEMO, *ALIASES]
        hint = f"known names: {', '.join(names[:SOME])} and {len(names) - SOME} more (moe-local list --all)"
    return ModelNotFoundError(f"model {name!r} not found: {reason}; {hint}")


def _carried_configs() -> Any:
    folder = importlib.resources.files("moe_local.offload.checkpoint") / "configs"
    if not folder.is_dir():
        raise CheckpointError("the package lacks its model configs; install moe-local again")
    return folder
