"""GPUs that torch names and cannot compute on, or that it does not find."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe_local.cache.errors import OptionError
from moe_local.offload import load as load_module
from moe_local.offload.doctor import graphics
from moe_local.offload.gpu import usable
from moe_local.offload.gpu.usable import runs_on
from moe_local.offload.options import LoadOptions

PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""What torch 2.11's build for CUDA 13.0 says it is for."""


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 1), PYPI, False),  # GTX 1080
        ((7, 0), PYPI, False),  # V100
        ((7, 5), PYPI, True),
        ((8, 9), PYPI, True),  # code for 8.6 runs on 8.9
        ((8, 7), PYPI, True),
        ((12, 1), PYPI, True),
        ((12, 0), ["sm_80", "sm_90"], False),  # an RTX 5090 with a build of its elders
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),  # which the driver compiles
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_90a"], False),
        ((5, 0), ["gfx1100"], True),
    ],
)
def test_what_a_build_runs_on(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert runs_on(capability, built) is runs


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """cards((8, 6), (6, 1)): torch of PyPI with devices of these capabilities."""

    def make(*capabilities: tuple[int, int]) -> None:
        for name, value in {
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "current_device": lambda: 0,
            "get_arch_list": lambda: PYPI,
            "get_device_capability": lambda card: capabilities[getattr(card, "index", card)],
            "get_device_name": lambda card: f"card {getattr(card, 'index', card)}",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    caches = (usable.unusable, usable._unused, usable._warn)
    for cached in caches:
        cached.cache_clear()
    yield make
    for cached in caches:
        cached.cache_clear()


def test_auto_takes_the_cards_that_can_compute(
    cards: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    cards((6, 1), (8, 6), (8, 6))
    second, third = (torch.device("cuda", index) for index in (1, 2))
    for _ in range(2):
        assert LoadOptions().torch_devices() == (second, third)
    assert LoadOptions(device="cuda").torch_device() == second
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("cuda:0 is left out: card 0 has compute capability 6.1")
    with pytest.raises(
        OptionError, match=r"'cuda:0' cannot be used: card 0 .* sm_75, .* only; install"
    ) as raised:
        LoadOptions(device="cuda:0").torch_devices()
    assert "\n" not in str(raised.value)


def test_with_none_that_can_auto_is_the_cpu(
    cards: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    cards((6, 1))
    assert LoadOptions().torch_devices() == (torch.device("cpu"),)
    assert "cuda:0 is left out" in caplog.text
    with pytest.raises(OptionError, match="cannot be used"):
        LoadOptions(device="cuda").torch_device()


@pytest.mark.parametrize(("hidden", "hardware", "lines"), [(None, True, 1), (None, False, 0), ("", True, 0)])
def test_that_the_cpu_computes_though_there_is_a_gpu_is_said_once(
    cards: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hidden: str | None,
    hardware: bool,
    lines: int,
) -> None:
    """A driver that is too old for this build of torch, or a build without CUDA."""
    cards()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(graphics, "has_nvidia_hardware", lambda: hardware)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert LoadOptions().torch_device() == torch.device("cpu")
            LoadOptions(device="cpu").torch_device()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == lines
    assert all("CUDA 13.0 finds none; update the driver" in line for line in said)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.bfloat16, ["card 0 (compute capability 7.5) computes bf16 without"]), (torch.float16, [])],
)
def test_a_card_without_units_for_bf16_is_named_once(
    cards: Callable[..., None], caplog: pytest.LogCaptureFixture, dtype: torch.dtype, said: list[str]
) -> None:
    cards((7, 5), (8, 0))
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    for _ in range(2):
        usable.tell_slow(devices, dtype)
    lines = [record.getMessage() for record in caplog.records]
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said
    assert all("--dense fp16" in line for line in lines)


def test_a_load_asks_for_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[..., Path]
) -> None:
    asked = []
    monkeypatch.setattr(load_module, "tell_slow", lambda *given: asked.append(given))
    for dense, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        load_module.load(make_checkpoint("mixtral"), experts="native", dense=dense, device="cpu").close()
        assert asked.pop() == ([torch.device("cpu")], dtype)
