import random

import pytest

from moe_local.cache.errors import ExpertFileError, OptionError
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.quantize.codec import codecs
from moe_local.offload.quantize.mix import (
    Mix,
    bits_range,
    canonical,
    check_bits,
    even_mix,
    is_mixed,
    uniform_bytes,
)
from moe_local.offload.system.home import expert_file_folder
from support import random_experts

FORMATS = ("nf4", "int8", "bf16")


@pytest.fixture
def spec():
    return random_experts.random_spec(layers=3, experts=5, hidden=128, inner=192)


def random_mix(spec, seed=0, name="mixed:6"):
    chance = random.Random(seed)
    return Mix(name, tuple(tuple(chance.choices(FORMATS, k=layer.num_experts)) for layer in spec.layers))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mixed:3.5", "mixed:3.5"),
        ("mixed:3.500", "mixed:3.5"),
        ("mixed:04", "mixed:4"),
        ("mixed:.5", "mixed:0.5"),
        ("mixed:3.14159", "mixed:3.142"),
        ("auto", "auto"),
        ("nf4", "nf4"),
        ("mixedbag", "mixedbag"),
    ],
)
def test_one_spelling(text, name):
    assert canonical(text) == canonical(canonical(text)) == name
    assert is_mixed(name) == (name == "auto" or name.startswith("mixed:"))


@pytest.mark.parametrize(
    "text", ["mixed", "mixed:", "mixed:x", "mixed:-3", "mixed:0", "mixed:3.5.1", "mixed:nan", "mixed:1e3"]
)
def test_no_number_of_bits(text):
    with pytest.raises(OptionError, match="is not an average number of bits; write for") as error:
        canonical(text)
    assert "\n" not in str(error.value)


def test_layouts_and_bytes(spec):
    mix = random_mix(spec)
    layouts = mix.layouts(spec)
    for layer, formats, found in zip(spec.layers, mix.formats, layouts, strict=True):
        assert list(found) == [codecs()[format].layout(layer.tensors) for format in formats]
    assert mix.nbytes(spec) == sum(layout.nbytes for layer in layouts for layout in layer)
    assert mix.bits(spec) == 8 * mix.nbytes(spec) / spec.expert_numel
    assert sum(mix.counts().values()) == 15
    least, most = bits_range(spec, FORMATS)
    assert 4.1 < least < mix.bits(spec) < most < 16.5


@pytest.mark.parametrize(
    ("name", "formats", "words"),
    [
        ("mixed:3", [], "has a layer without experts"),
        ("mixed:3", [["nf4"], []], "has a layer without experts"),
        ("mixed:3", [["nf4", "nf5"]], "expert 1 of MoE layer 0 in format 'nf5'"),
        ("mixed:3.0", [["nf4"]], "should be called mixed:3;"),
        ("../..", [["nf4"]], "which is not mixed:BITS"),
        (3, [["nf4"]], "which is not mixed:BITS"),
    ],
)
def test_what_is_no_mix(name, formats, words):
    with pytest.raises(ExpertFileError, match=words) as error:
        Mix(name, tuple(map(tuple, formats)))
    assert "\n" not in str(error.value)


def test_a_mix_of_another_model(spec):
    other = random_experts.random_spec(layers=3, experts=4)
    with pytest.raises(
        ExpertFileError, match="mixed:6 is for 3 layers of 5 experts, the model has 3 layers of 4 experts"
    ):
        random_mix(spec).layouts(other)


@pytest.mark.parametrize("bits", [4.6, 6, 8.6, 12.25])
def test_an_even_mix(spec, bits):
    mix = even_mix(f"mixed:{bits:g}", spec, FORMATS)
    largest = max(layout.nbytes for layer in mix.layouts(spec) for layout in layer)
    assert 0 <= bits * spec.expert_numel / 8 - mix.nbytes(spec) <= largest
    assert len(mix.counts()) <= 2
    for format in mix.counts():  # evenly: no layer has much more of one than another
        each = [layer.count(format) for layer in mix.formats]
        assert max(each) - min(each) <= 1


def test_at_the_limits_all_are_alike(spec):
    for format in ("nf4", "bf16"):
        bits = uniform_bytes(spec, format) * 8 / spec.expert_numel
        name = canonical(f"mixed:{bits + 0.0005:.3f}" if format == "nf4" else f"mixed:{bits - 0.0005:.3f}")
        if bits_range(spec, FORMATS)[0] <= float(name[6:]) <= bits_range(spec, FORMATS)[1]:
            assert format in even_mix(name, spec, FORMATS).counts()


@pytest.mark.parametrize("bits", ["1", "40"])
def test_impossible_bits_say_which_are_possible(spec, bits):
    with pytest.raises(
        OptionError, match=r"which no formats give; for tiny use mixed:[\d.]+ to mixed:"
    ) as error:
        check_bits(f"mixed:{bits}", spec, "tiny")
    low, high = str(error.value).rpartition(" use ")[2].split(" to ")
    assert "\n" not in str(error.value)
    for limit in (low, high):
        assert check_bits(limit, spec) == float(limit[6:])


def test_convert_a_mix(tmp_path):
    source = random_experts.RandomExperts(layers=2, experts=4)
    mix = random_mix(source.spec, seed=1)
    file = convert_experts(source, mix, tmp_path / "f")
    assert not find_damage(file)
    assert file.format == "mixed:6"
    assert [layer.layouts for layer in file.layers] == list(mix.layouts(source.spec))
    for layer in source.spec.layers:
        for expert, format in enumerate(mix.formats[layer.index]):
            alone = convert_experts(source, codecs()[format], tmp_path / format)
            assert file.read(layer.index, expert) == alone.read(layer.index, expert)
    before = len(source.reads)
    assert convert_experts(source, mix, tmp_path / "f", check=True).format == "mixed:6"
    assert len(source.reads) == before


def test_a_mix_goes_on_where_it_was_interrupted(tmp_path):
    source = random_experts.RandomExperts(layers=2, experts=4)
    mix = random_mix(source.spec, seed=1)
    source.fail_at = (1, 2)
    with pytest.raises(KeyboardInterrupt):
        convert_experts(source, mix, tmp_path / "f")
    source.fail_at, source.reads = None, []
    other = Mix(mix.name, (mix.formats[0], mix.formats[0]))  # the first layer is the same
    assert not find_damage(convert_experts(source, other, tmp_path / "f"))
    assert {layer for layer, _ in source.reads} == {1}


def test_another_mix_of_the_same_name(tmp_path):
    source = random_experts.RandomExperts(layers=2, experts=4)
    mix = Mix("mixed:6", (("nf4", "bf16", "nf4", "int8"),) * 2)
    convert_experts(source, mix, tmp_path / "f")
    other = Mix("mixed:6", (mix.formats[0], ("nf4", "bf16", "int8", "nf4")))
    with pytest.raises(
        ExpertFileError, match="another mixed:6: 2 of 8 experts have other formats; remove"
    ) as error:
        convert_experts(source, other, tmp_path / "f")
    assert "\n" not in str(error.value)
    assert ExpertFile.open(tmp_path / "f").layers[1].layouts == mix.layouts(source.spec)[1]
    with pytest.raises(ExpertFileError, match="is for 2 layers of 4 experts, tiny/Random-Experts has 3"):
        convert_experts(random_experts.RandomExperts(layers=3, experts=4), mix, tmp_path / "g")


def test_folders_of_mixes_have_names_that_every_disk_takes(tmp_path):
    assert (
        expert_file_folder(tmp_path, "m", "mixed:3.5", "0123456789abcdef01").name
        == "mixed-3.5-0123456789abcdef"
    )
