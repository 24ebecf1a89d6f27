"""The aliases: carried configs against the published parameter counts, lookup, near matches."""

from __future__ import annotations

from importlib.resources import files

import pytest

from moe_local.cache.errors import ModelNotFoundError
from moe_local.offload.checkpoint import registry
from moe_local.offload.checkpoint.registry import ALIASES, find_alias, near_matches, not_found
from moe_local.offload.checkpoint.spec import model_spec

PUBLISHED = {
    # total and active parameters in 1e9, layers, experts, top-k, context: the model cards
    "mixtral-8x7b": (46.70, 12.9, 32, 8, 2, 32768),
    "mixtral-8x22b": (140.6, 39.1, 56, 8, 2, 65536),
    "qwen3-30b-a3b": (30.53, 3.35, 48, 128, 8, 40960),
    "qwen3-coder-30b-a3b": (30.53, 3.35, 48, 128, 8, 262144),
    "qwen3-235b-a22b": (235.1, 22.2, 94, 128, 8, 40960),
    "olmoe-1b-7b": (6.92, 1.28, 16, 64, 8, 4096),
    "qwen1.5-moe-a2.7b": (14.3, 2.69, 24, 60, 4, 32768),
}


def test_every_alias_is_checked() -> None:
    assert set(PUBLISHED) == set(ALIASES)


def test_no_config_is_left_over() -> None:
    carried = {path.name for path in (files("moe_local.offload.checkpoint") / "configs").iterdir()}
    assert carried == {f"{alias}.json" for alias in ALIASES}


@pytest.mark.parametrize("alias", PUBLISHED)
def test_carried_config_has_the_published_size(alias: str) -> None:
    total, active, layers, experts, top_k, context = PUBLISHED[alias]
    entry = ALIASES[alias]
    spec = model_spec(entry.config())
    assert spec.total_numel == entry.parameters
    assert spec.total_numel / 1e9 == pytest.approx(total, rel=2e-3)
    assert spec.active_numel / 1e9 == pytest.approx(active, rel=5e-3)
    assert (len(spec.layers), spec.num_experts, spec.top_k) == (layers, experts, top_k)
    assert spec.max_context == context
    assert entry.checkpoint_bytes == spec.total_numel * spec.dtype.itemsize


def test_mixtral_is_the_published_checkpoint() -> None:
    """metadata.total_size of its index: 86.99 GiB in 19 shards."""
    mixtral = ALIASES["mixtral-8x7b"]
    assert mixtral.repo_id == "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert mixtral.checkpoint_bytes == 93_405_585_408


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
