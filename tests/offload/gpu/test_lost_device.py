from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload import load as load_module
from moe_local.offload.gpu.lost_device import raise_as_one_line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be", "MISSES=off"),
        ("Triton Error [CUDA]: misaligned address", "MOE_LOCAL_TRITON=off"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nand more", "what else uses the GPU"),
    ],
)
def test_what_cuda_says_becomes_a_line_with_a_remedy(text: str, said: str) -> None:
    with pytest.raises(MoeLocalError) as raised:
        raise_as_one_line(RuntimeError(text))
    assert "\n" not in str(raised.value)
    assert said in str(raised.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        raise_as_one_line(RuntimeError("shapes do not match"))


def test_a_device_that_is_lost_in_a_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nSearch for more")

    monkeypatch.setattr(load_module, "_assemble", lost)
    given: Any = None
    with pytest.raises(
        MoeLocalError, match="failed while the model was loaded: CUDA error: unspecified launch"
    ):
        load_module.assemble(given, given, given, given, torch.device("cpu"), None)
