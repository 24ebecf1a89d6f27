"""Names of users' own policies and prefetchers: taken ones are refused, the same again is no error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import moe_local
from moe_local.cache import policies
from moe_local.cache.lru import LRUPolicy
from moe_local.offload.options import LoadOptions
from moe_local.offload.prefetch import names


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    registries: tuple[dict[str, Any], ...] = (policies.POLICIES, policies._own, names.OWN)
    before = [dict(registry) for registry in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


class Mine(LRUPolicy):
    pass


def prefetcher(*_: object) -> Any:
    raise AssertionError("nothing is loaded here")


@pytest.mark.parametrize("name", ["lru", "adaptive", "mine"])
def test_a_policy_name_that_is_taken(name: str) -> None:
    moe_local.register_policy("mine", LRUPolicy)
    with pytest.raises(moe_local.MoeLocalError, match=f"eviction policy '{name}' already exists"):
        moe_local.register_policy(name, Mine)
    moe_local.register_policy("mine", LRUPolicy)  # the same again, as when a notebook's cell is run twice


@pytest.mark.parametrize("name", ["auto", "off", "router", "learned", "mine"])
def test_a_prefetcher_name_that_is_taken(name: str) -> None:
    moe_local.register_prefetcher("mine", prefetcher)
    with pytest.raises(moe_local.MoeLocalError, match=f"prefetch '{name}' already exists"):
        moe_local.register_prefetcher(name, lambda *_: prefetcher())
    moe_local.register_prefetcher("mine", prefetcher)


@pytest.mark.parametrize("register", [moe_local.register_policy, moe_local.register_prefetcher])
@pytest.mark.parametrize(("name", "make"), [("other", 5), (5, Mine), ("other", None)])
def test_what_makes_nothing_is_refused_at_once(register: Any, name: Any, make: Any) -> None:
    with pytest.raises(moe_local.MoeLocalError, match="give a name, and a function that makes one"):
        register(name, make)


def test_options_know_them_once_they_are_registered() -> None:
    for option, register in (
        ("policy", lambda: moe_local.register_policy("mine", Mine)),
        ("prefetch", lambda: moe_local.register_prefetcher("mine", prefetcher)),
    ):
        with pytest.raises(moe_local.MoeLocalError, match="mine"):
            LoadOptions(**{option: "mine"})
        register()
        LoadOptions(**{option: "mine"})
