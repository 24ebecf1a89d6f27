"""Where experts are encoded, on a machine whose clock and GPU are the test's own."""

from __future__ import annotations

import pytest
import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.expert_file import encoder as encoder_module
from moe_local.offload.expert_file.encoder import CPU, ExpertEncoder
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec, make_layout
from support import random_experts

GPU = torch.device("meta")
"""Tensors can be moved there on any machine."""

SPECS = (TensorSpec("w", (64, 64)),)
LAYOUT = make_layout("slow", SPECS, [("w", "values", "uint8", (64, 64))])


class SlowCodec:
    """Takes so many seconds of `clock` a call by device type; `full` devices have no memory."""

    name = "slow"

    def __init__(self, seconds: dict[str, list[float]], full: bool = False, exact: bool = False) -> None:
        self.exact = exact
        self.full = full
        self.seconds = {device: iter(times) for device, times in seconds.items()}
        self.clock = 100.0
        self.places: list[str] = []

    def encode(self, tensors, layout, out):
        place = tensors["w"].device.type
        self.places.append(place)
        if place == GPU.type and self.full:
            raise torch.OutOfMemoryError("out of memory")
        self.clock += next(self.seconds[place])


@pytest.fixture
def spec():
    return random_experts.random_spec(1, 8)


def run(monkeypatch, spec, codec, gpu=GPU, experts=8) -> list[str]:
    encoder = ExpertEncoder("tiny", codec, gpu)
    monkeypatch.setattr(encoder_module.time, "perf_counter", lambda: codec.clock)
    for expert in range(experts):
        encoder.encode(spec.layers[0], expert, {"w": torch.zeros(64, 64)}, LAYOUT, torch.empty(0))
    return codec.places


def test_without_a_gpu_all_on_the_cpu(monkeypatch, spec):
    assert run(monkeypatch, spec, SlowCodec({"cpu": [1.0] * 8}), None) == ["cpu"] * 8


def test_the_faster_one_takes_over_after_two_trials_each(monkeypatch, spec):
    """The first, slow with whatever it sets up, does not count."""
    trials = ["meta", "cpu", "meta", "cpu"]
    fast_gpu = SlowCodec({"meta": [9.0] + [0.5] * 7, "cpu": [0.1] + [1.0] * 7})
    assert run(monkeypatch, spec, fast_gpu) == trials + ["meta"] * 4
    fast_cpu = SlowCodec({"meta": [0.1] + [2.0] * 7, "cpu": [9.0] + [1.0] * 7})
    assert run(monkeypatch, spec, fast_cpu) == trials + ["cpu"] * 4


def test_a_full_gpu_is_left_alone(monkeypatch, spec):
    codec = SlowCodec({"cpu": [1.0] * 8}, full=True)
    assert run(monkeypatch, spec, codec) == ["meta"] + ["cpu"] * 8


def test_a_full_ram_is_an_error(monkeypatch, spec):
    codec = SlowCodec({})
    codec.encode = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        run(monkeypatch, spec, codec, None, 1)


def test_copies_are_not_sent_around(monkeypatch, spec):
    codec = SlowCodec({"cpu": [1.0] * 8}, exact=True)
    assert run(monkeypatch, spec, codec) == ["cpu"] * 8


@pytest.mark.parametrize("gpu", [None, CPU])
def test_the_bytes_are_the_codec_s(spec, gpu):
    codec = codec_for("nf4")
    layout = codec.layout(spec.layers[0].tensors)
    encoder = ExpertEncoder("tiny", codec, gpu)
    for expert in range(6):
        generator = torch.Generator().manual_seed(expert)
        tensors = {t.name: torch.randn(t.shape, generator=generator) for t in spec.layers[0].tensors}
        buffers = torch.empty(layout.nbytes, dtype=torch.uint8), torch.empty(layout.nbytes, dtype=torch.uint8)
        encoder.encode(spec.layers[0], expert, tensors, layout, buffers[0])
        codec.encode(tensors, layout, buffers[1])
        assert torch.equal(*buffers)


def test_what_cannot_be_encoded_is_named(spec):
    codec = codec_for("nf4")
    layer = spec.layers[0]
    layout = codec.layout(layer.tensors)
    tensors = {t.name: torch.zeros(t.shape) for t in layer.tensors}
    tensors["down_proj"][1, 1] = float("nan")
    with pytest.raises(CheckpointError, match=rf"^tiny: {layer.name}, expert 5: down_proj has 1 of .* NaN"):
        ExpertEncoder("tiny", codec).encode(
            layer, 5, tensors, layout, torch.empty(layout.nbytes, dtype=torch.uint8)
        )
