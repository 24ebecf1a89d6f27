"""The aliases: carried configs against the published parameter counts, lookup, near matches."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path

import pytest

from moe_local.cache.errors import ModelNotFoundError
from moe_local.offload.checkpoint import registry
from moe_local.offload.checkpoint.registry import ALIASES, find_alias, near_matches, not_found
from moe_local.offload.checkpoint.spec import model_spec
from support.variants import others_slow

PUBLISHED = {
    # total and active parameters in 1e9, MoE layers, experts, top-k, context: model cards and configs
    "mixtral-8x7b": (46.70, 12.9, 32, 8, 2, 32768),
    "mixtral-8x22b": (140.6, 39.1, 56, 8, 2, 65536),
    "qwen3-30b-a3b": (30.53, 3.35, 48, 128, 8, 40960),
    "qwen3-coder-30b-a3b": (30.53, 3.35, 48, 128, 8, 262144),
    "qwen3-235b-a22b": (235.1, 22.2, 94, 128, 8, 40960),
    "qwen3-next-80b-a3b": (80, 3, 48, 512, 10, 262144),
    "qwen3.5-35b-a3b": (35, 3, 40, 256, 8, 262144),
    "qwen3.6-35b-a3b": (35, 3, 40, 256, 8, 262144),
    "qwen1.5-moe-a2.7b": (14.3, 2.69, 24, 60, 4, 32768),
    "qwen2-57b-a14b": (57.41, 14, 28, 64, 8, 32768),
    "deepseek-v2-lite": (15.7, 2.4, 26, 64, 6, 163840),
    "deepseek-v2": (236, 21, 59, 160, 6, 163840),
    "deepseek-v3": (671, 37, 58, 256, 8, 163840),
    "deepseek-r1": (671, 37, 58, 256, 8, 163840),
    "deepseek-v3.2": (671, 37, 58, 256, 8, 163840),
    "deepseek-v4-flash": (284, 13, 43, 256, 6, 1048576),
    "deepseek-v4-pro": (1600, 49, 61, 384, 6, 1048576),
    "llama-4-scout": (109, 17, 48, 16, 1, 10485760),
    "llama-4-maverick": (400, 17, 24, 128, 1, 1048576),
    "gemma-4-26b-a4b": (25.2, 3.8, 30, 128, 8, 262144),
    "gpt-oss-20b": (20.9, 3.6, 24, 32, 4, 131072),
    "gpt-oss-120b": (116.8, 5.1, 36, 128, 4, 131072),
    "glm-4.5": (355, 32, 89, 160, 8, 131072),
    "glm-4.6": (355, 32, 89, 160, 8, 202752),
    "glm-4.5-air": (106, 12, 45, 128, 8, 131072),
    "glm-4.7-flash": (30, 3, 46, 64, 4, 202752),
    "olmoe-1b-7b": (6.92, 1.28, 16, 64, 8, 4096),
    "phi-3.5-moe": (41.9, 6.6, 32, 16, 2, 131072),
    "granite-3.1-3b-a800m": (3.3, 0.8, 32, 40, 8, 131072),
    "minimax-m2": (230, 10, 62, 256, 8, 196608),
    "ernie-4.5-21b-a3b": (21.8, 3, 27, 64, 6, 131072),
    "jamba-1.5-mini": (52, 12, 16, 16, 2, 262144),
    "nemotron-3-nano-30b-a3b": (31.6, 3.2, 23, 128, 6, 262144),
    "lfm2-8b-a1b": (8.3, 1.5, 22, 32, 4, 128000),
    "switch-base-8": (0.62, 0.22, 12, 8, 1, 32768),
}


def test_every_alias_is_checked() -> None:
    assert set(PUBLISHED) == set(ALIASES)


def test_no_config_is_left_over() -> None:
    carried = {path.name for path in (files("moe_local.offload.checkpoint") / "configs").iterdir()}
    assert carried == {f"{alias}.json" for alias in ALIASES}


@pytest.mark.parametrize("alias", others_slow(PUBLISHED, list(PUBLISHED)[::4]))
def test_carried_config_has_the_published_size(
    alias: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards round, and some count the layers that predict further tokens, or towers for images, too. Active
    parameters are told with the embeddings and the head, with one of them, or with none."""
    total, active, layers, experts, top_k, context = PUBLISHED[alias]
    entry = ALIASES[alias]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    spec = model_spec(entry.config())
    assert not caplog.messages, "what was published is in order"
    assert spec.total_numel == entry.parameters
    assert spec.total_numel / 1e9 == pytest.approx(total, rel=0.02)
    vocabulary = spec.vocab_size * spec.hidden_size / 1e9
    found = spec.active_numel / 1e9
    assert 0.9 * (found - 2 * vocabulary) <= active <= 1.01 * found
    assert (len(spec.layers), spec.num_experts, spec.top_k) == (layers, experts, top_k)
    assert spec.max_context == context


def test_mixtral_is_the_published_checkpoint() -> None:
    mixtral = ALIASES["mixtral-8x7b"]
    assert mixtral.repo_id == "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert 2 * mixtral.parameters == 93_405_585_408  # metadata.total_size of its index


def test_lookup_ignores_case_and_spaces() -> None:
    assert find_alias(" Mixtral-8x7B ") is ALIASES["mixtral-8x7b"]
    assert find_alias("mixtral") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mixtral-8x7", "mixtral-8x7b"),
        ("mixtrel-8x7b", "mixtral-8x7b"),
        ("mixtral", "mixtral-8x7b"),
        ("Qwen3-30B", "qwen3-30b-a3b"),
        ("mistralai/Mixtral-8x7B-Instruct", "mixtral-8x7b"),
        ("demmo", "demo"),
    ],
)
def test_near_matches(name: str, meant: str) -> None:
    assert meant in near_matches(name)
    assert f"{meant}" in str(not_found(name, "because"))


def test_not_found_without_near_matches_lists_what_there_is() -> None:
    error = not_found("zzz", "no such thing")
    assert isinstance(error, ModelNotFoundError)
    assert "known names: demo, mixtral-8x7b" in str(error)
    assert "\n" not in str(error)


def test_missing_demo_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(registry.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match="install moe-local again"):
        registry.demo_folder()


def test_the_documented_table_is_that_of_the_package(repository: Path) -> None:
    rows = {}
    for line in (repository / "docs" / "models.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].startswith("`"):
            rows[cells[1].strip("`")] = cells
    assert set(rows) == set(ALIASES)
    for alias, (family, _, hub, size, stored, _) in rows.items():
        entry = ALIASES[alias]
        total, active = PUBLISHED[alias][:2]
        assert family
        assert hub == f"[{entry.repo_id}](https://huggingface.co/{entry.repo_id})"
        found = [float(part.split()[0]) / (1000 if part.endswith("M") else 1) for part in size.split(" / ")]
        assert found[0] == pytest.approx(entry.parameters / 1e9, abs=0.06)
        assert found[0] == pytest.approx(total, rel=0.02)
        assert found[1] >= 0.99 * active
        assert stored == entry.stored
