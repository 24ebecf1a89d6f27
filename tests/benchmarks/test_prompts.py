"""prompts.py, at sizes that tell nothing but that its figures belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prompts
import pytest

from moe_local.offload.native.library import ISAS, library

pytestmark = pytest.mark.skipif(
    (lib := library()) is None or lib.moe_isa() == ISAS.index("portable"), reason="it needs the kernels"
)


def test_every_part_is_measured_beside_torchs(
    finished: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "ATTENTION", {"small": (4, 2, 32, 16)})
    monkeypatch.setattr(prompts, "SPANS", ((16, 16), (16, 64)))
    document = finished("prompts", "--rounds", "2", "--parts", "attention", "norm", "--dtype", "fp32")
    assert [case["shape"] for case in document["cases"][:2]] == ["small, 16 of 16", "small, 16 of 64"]
    assert {case["part"] for case in document["cases"]} == {"attention", "norm"}
    for case in document["cases"]:
        assert set(case["ms"]) == {"ours", "others"}
        assert all(len(of) == 2 and min(of) > 0 for of in case["ms"].values())
        ratios = [b / a for a, b in zip(*case["ms"].values(), strict=True)]
        assert min(ratios) <= case["times_faster"]["median"] <= max(ratios)


@pytest.mark.parametrize("part", ["attention", "window", "linear", "norm"])
def test_both_ways_give_the_same(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "ATTENTION", {"small": (4, 2, 32, 16)})
    monkeypatch.setattr(prompts, "SPANS", ((16, 16), (16, 64)))
    for case in prompts.PARTS[part](prompts.DTYPES["fp32"]):
        ours, others = case.ours(), case.others()
        if isinstance(ours, tuple):  # the delta rule's, with its states
            assert all(a.allclose(b, atol=1e-4) for a, b in zip(ours, others, strict=True))
        else:
            assert ours.allclose(others.transpose(1, 2) if ours.dim() == 4 else others, atol=1e-4)
