from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_local.cache.errors import OptionError
from moe_local.offload import options
from moe_local.offload.gpu import usable
from moe_local.offload.options import LoadOptions
from moe_local.offload.prefetch.names import prefetchers
from moe_local.offload.quantize.codec import codecs


def test_sizes_become_bytes():
    made = LoadOptions(vram="20GiB", ram=1.5e9, slots=3)  # type: ignore[arg-type]
    assert (made.vram, made.ram, made.slots) == (20 * 2**30, 1_500_000_000, 3)


def test_frozen_and_comparable():
    assert LoadOptions(ram="1GiB") == LoadOptions(ram=2**30)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadOptions().ram = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keyword", "value", "said"),
    [
        ("vram", "lots", "vram 'lots' is not a size"),
        ("vram", 24, "vram 24 would be 24 bytes; write for example 24GiB"),
        ("vram", "2x24", "vram 24 would be 24 bytes; write for example 24GiB"),
        ("ram", "64", "ram 64 would be 64 bytes; write for example 64GiB"),
        ("ram", "99999999TiB", "ram '99999999TiB' is not a size; it must be below 8388608 TiB"),
        ("ram", "0GiB", "above 0"),
        ("ram", "-1GiB", "not a size"),
        ("slots", 0, "slots 0 is not a number from 1 up"),
        ("slots", "many", "slots 'many'"),
        ("slots", True, "slots True"),
        ("context", -5, "context -5"),
        ("device", "tpu", "use auto, cpu, cuda or cuda:N"),
        ("device", None, "unknown device None"),
        ("experts", "q4_0", "use one of nf4, int8, q3, q2, mxfp4, fp8, bf16, fp16, fp32"),
        ("dense", "int3", "use one of auto, nf4, int8, bf16, fp16, fp32"),
        ("policy", "random", "lru"),
        ("prefetch", "on", "use one of auto, off, router, learned"),
        ("miss", "skip", "use one of auto, fetch, cpu"),
        ("activations", "int4", "use one of native, int8"),
    ],
)
def test_a_bad_value_names_itself_and_what_is_allowed(keyword, value, said):
    with pytest.raises(OptionError) as caught:
        LoadOptions.from_keywords({keyword: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_may_be_torchs():
    assert LoadOptions.from_keywords({"device": torch.device("cuda", 1)}).device == "cuda:1"
    with pytest.raises(OptionError, match="unknown device 'meta'"):
        LoadOptions.from_keywords({"device": torch.device("meta")})


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(OptionError, match="unknown option 'prefech'; did you mean 'prefetch'"):
        LoadOptions.from_keywords({"prefech": "off"})
    with pytest.raises(OptionError, match="there are device, vram, ram"):
        LoadOptions.from_keywords({"zzz": 1})


def test_vram_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LoadOptions().torch_device() == torch.device("cpu")
    with pytest.raises(OptionError, match="vram is given but the device is cpu"):
        LoadOptions.from_keywords({"vram": "8GiB"}).torch_device()
    with pytest.raises(OptionError, match="0 CUDA devices found"):
        LoadOptions(device="cuda").torch_device()


def test_the_device_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(usable, "unusable", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert LoadOptions().torch_device() == torch.device("cuda:1")
    assert LoadOptions(device="cuda:0", vram=2**30).torch_device() == torch.device("cuda:0")
    with pytest.raises(OptionError, match="2 CUDA devices found"):
        LoadOptions(device="cuda:2").torch_device()
    assert LoadOptions(device="cuda:0", miss="cpu").torch_device() == torch.device("cuda:0")
    with pytest.raises(
        OptionError, match="activations 'int8' is for the CPU kernel only; use native on cuda:0"
    ):
        LoadOptions(device="cuda:0", activations="int8").torch_device()


def test_each_option_says_what_it_is_and_names_every_choice():
    choices = {
        "experts": [*codecs(), "native"],
        "policy": list(options._policies()),
        "dense": options.DENSE_FORMATS,
        "prefetch": prefetchers(),
        "miss": options.MISS,
        "activations": options.ACTIVATIONS,
    }
    for option in dataclasses.fields(LoadOptions):
        text = option.metadata["help"]
        assert text.endswith(".")
        for choice in choices.get(option.name, ()):
            assert choice in text, f"{option.name}: {choice} is missing in its help"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("24GiB,24GiB", (24 * 2**30, 24 * 2**30)),
        ("2x24GiB", (24 * 2**30, 24 * 2**30)),
        ("2 x 24 GiB, 12GiB", (24 * 2**30, 24 * 2**30, 12 * 2**30)),
        (["24GiB", 2**30], (24 * 2**30, 2**30)),
        (("24GiB",), 24 * 2**30),
        ("1x24GiB", 24 * 2**30),
    ],
)
def test_vram_of_several_cards(given: object, expected: object) -> None:
    assert LoadOptions(vram=given).vram == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("24GiB,", "vram '' is not a size"),
        ("24GiB,lots", "vram 'lots' is not a size"),
        ("2x", "vram '2x' is not a size"),
        ("0x24GiB", "names 0 cards"),
        ("1000000000x1GiB", "names 1000000000 cards"),
        (",".join(["1GiB"] * 65), "names 65 cards"),
        ([], "names 0 cards"),
        ("24GiB;24GiB", "is not a size"),
        ("24GiB,-1GiB", "is not a size"),
    ],
)
def test_vram_of_cards_that_cannot_be(given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        LoadOptions(vram=given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_all_cards_may_be_used_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(usable, "unusable", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    one, two, three = (torch.device("cuda", index) for index in range(3))
    assert LoadOptions().torch_devices() == (two, one, three)
    assert LoadOptions(device="cuda", vram="8GiB").torch_devices() == (two, one, three)
    assert LoadOptions(device="cuda:2").torch_devices() == (three,)
    assert LoadOptions(device="cpu").torch_devices() == (torch.device("cpu"),)
    options = LoadOptions(vram="8GiB,4GiB")
    assert options.torch_devices() == (one, two)
    assert (options.card_vram(0), options.card_vram(1)) == (8 * 2**30, 4 * 2**30)
    assert LoadOptions(vram="8GiB").card_vram(2) == 8 * 2**30
    with pytest.raises(OptionError, match="names 4 cards, but there are 3 CUDA devices"):
        LoadOptions(vram="4x8GiB").torch_devices()
    with pytest.raises(OptionError, match="names 2 cards, but the device is cuda:1"):
        LoadOptions(vram="2x8GiB", device="cuda:1").torch_devices()
    with pytest.raises(OptionError, match="which has none"):
        LoadOptions(vram="2x8GiB", device="cpu").torch_devices()
