"""Choosing formats: what is measured against plain computations, and what is chosen from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.offload.allocation import allocate as allocate_module
from moe_local.offload.allocation import gains, measure, samples
from moe_local.offload.allocation.allocate import allocate, best_mix, partial_path, sensitivity_path
from moe_local.offload.allocation.expected import candidates, format_error
from moe_local.offload.allocation.gains import layer_gains, texts_of
from moe_local.offload.allocation.knapsack import Choice, Option
from moe_local.offload.allocation.measure import Measurement, Reading, read_text
from moe_local.offload.allocation.misses import MissCost, hits
from moe_local.offload.allocation.samples import LayerSamples, Watch, experts_of, rows_of
from moe_local.offload.allocation.sensitivity import EVEN, LayerSensitivity, Sensitivity
from moe_local.offload.allocation.text import calibrate
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.plan.estimate import hit_rate
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.mix import bits_range

CPU = torch.device("cpu")
FORMATS = ("nf4", "int8")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 320, (600,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model(tiny_mixtral: Path) -> Iterator[moe_local.Model]:
    with moe_local.load(tiny_mixtral, experts="native", device="cpu", prefetch="off", context=256) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def checkpoint(tiny_mixtral: Path) -> Checkpoint:
    return Checkpoint.open(tiny_mixtral)


@pytest.fixture(scope="module")
def reading(model: moe_local.Model, ids: list[int]) -> Reading:
    """Of 512 tokens, every input of every expert kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MOST_INPUTS", 10_000)
        patch.setattr(measure, "GAIN_TEXTS", 2)
        return read_text(model.hf, ids)


@pytest.fixture(scope="module")
def sensitivity(
    checkpoint: Checkpoint, reading: Reading, tmp_path_factory: pytest.TempPathFactory
) -> Sensitivity:
    partial = tmp_path_factory.mktemp("partial") / "partial.json"
    return Measurement(checkpoint, FORMATS, reading, partial, CPU).run()


def test_a_reading_counts_every_choice(reading: Reading, model: moe_local.Model) -> None:
    assert reading.tokens == 512
    for layer in reading.samples:
        assert layer.tokens == 512
        assert sum(layer.uses) == 2 * 512
        assert [len(layer.inputs(e)[0]) for e in range(8)] == layer.uses
    assert all(type(module.runner).__name__ == "ExpertRunner" for module in experts_of(model.hf))


def test_errors_are_those_of_the_layers_output(
    model: moe_local.Model, checkpoint: Checkpoint, sensitivity: Sensitivity, ids: list[int]
) -> None:
    """One expert quantized, all else exact: the mean relative squared change of the layer's output."""
    layer, expert = checkpoint.spec.layers[1], 3
    seen: list[tuple[torch.Tensor, ...]] = []
    module = experts_of(model.hf)[1]
    with torch.inference_mode():
        hook = module.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
        for row in rows_of(ids, 512):
            model.hf(input_ids=row[None], use_cache=False)
        hook.remove()
    codec = codec_for("nf4")
    layout = codec.layout(layer.tensors)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    exact = checkpoint.read_expert(layer, expert)
    codec.encode(exact, layout, buffer)
    found = []
    for hidden, index, weights, output in seen:
        for token in range(len(hidden)):
            change = torch.zeros(hidden.shape[1])
            for rank in (index[token] == expert).nonzero().flatten().tolist():
                answers = [
                    (torch.nn.functional.silu(gate) * up) @ w["down_proj"].T
                    for w in (exact, codec.decode(buffer, layout, torch.float32))
                    for gate, up in [(hidden[token] @ w["gate_up_proj"].T).chunk(2)]
                ]
                change += weights[token, rank] * (answers[1] - answers[0])
            found.append(float(change.square().sum() / output[token].square().sum()))
    mine = sensitivity.layers[1]
    assert mine.uses[expert] * mine.errors["nf4"][expert] == pytest.approx(sum(found) / len(found), rel=1e-3)
    assert mine.errors["int8"][expert] < mine.errors["nf4"][expert] / 20


def test_a_reservoir_is_a_fair_sample() -> None:
    layer = LayerSamples(2, 40, torch.Generator().manual_seed(0))
    for start in range(0, 400, 50):
        hidden = torch.arange(start, start + 50.0)[:, None]
        index = torch.zeros(50, 1, dtype=torch.int64)
        layer.see(hidden, index, torch.ones(50, 1), torch.full((50, 1), 2.0))
    kept, weights = layer.inputs(0)
    assert len(kept) == 40
    assert len(set(kept.flatten().tolist())) == 40
    assert 120 < float(kept.mean()) < 280
    assert weights.tolist() == [0.5] * 40
    assert layer.uses == [400, 0]
    assert len(layer.inputs(1)[0]) == 0
    assert len(layer.others(1, 8)) == 8


def test_memory_is_bounded(model: moe_local.Model, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    width = 64 * 4
    monkeypatch.setattr(samples, "MOST_BYTES", 24 * 10 * width)
    with Watch(experts_of(model.hf)) as watch, torch.inference_mode():
        model.hf(input_ids=rows_of(ids, 512), use_cache=False)
    kept = [len(layer.inputs(e)[0]) for layer in watch.layers for e in range(8)]
    assert max(kept) == 10


def test_harm_grows_with_the_square_of_the_noise(
    model: moe_local.Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(ids, 2)
    assert texts.shape == (2, gains.TOKENS)
    found = layer_gains(model.hf, texts)
    assert found == layer_gains(model.hf, texts)
    assert all(gain > 0 for gain in found)
    monkeypatch.setattr(gains, "ROWS", 2)  # one layer at a time
    monkeypatch.setattr(gains, "NOISE", 0.1)
    smaller = layer_gains(model.hf, texts)
    assert smaller == pytest.approx(found, rel=0.5)


def test_a_killed_measurement_goes_on(
    checkpoint: Checkpoint,
    reading: Reading,
    sensitivity: Sensitivity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "SAVE_SECONDS", -1.0)
    partial, count, real = tmp_path / "partial.json", 0, measure.expert_errors

    def fails(*args: object) -> object:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "expert_errors", fails)
    with pytest.raises(KeyboardInterrupt):
        Measurement(checkpoint, FORMATS, reading, partial, CPU).run()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["partial.json"]
    count = 100
    assert Measurement(checkpoint, FORMATS, reading, partial, CPU).run() == sensitivity
    assert count == 108  # two layers of 8 were kept
    assert not partial.exists()
    sensitivity.save(partial)  # of another text: nothing of it is taken
    Measurement(checkpoint, FORMATS, replace(reading, text="other"), partial, CPU).run()
    assert count == 132


def test_kept_figures_come_back_or_not_at_all(sensitivity: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sensitivity.json"
    sensitivity.save(path)
    assert Sensitivity.read(path, sensitivity.fingerprint) == sensitivity
    assert Sensitivity.read(path, "another") is None
    path.write_text(path.read_text()[:-20])
    assert Sensitivity.read(path, sensitivity.fingerprint) is None
    path.write_text('{"version": 99}')
    assert Sensitivity.read(path, sensitivity.fingerprint) is None
    assert Sensitivity.read(tmp_path / "none", sensitivity.fingerprint) is None


@pytest.mark.parametrize("bits", [5.4, 6.0, 7.0])
def test_a_mix_is_never_expected_to_be_worse(
    checkpoint: Checkpoint, sensitivity: Sensitivity, bits: float
) -> None:
    spec = checkpoint.spec
    found = best_mix(f"mixed:{bits:g}", spec, sensitivity)
    assert found == best_mix(f"mixed:{bits:g}", spec, sensitivity)
    found.mix.check(spec)
    assert found.mix.bits(spec) == found.bits <= bits
    assert found.harm <= found.even_harm
    assert found.gap == 0  # small enough for the exact solver
    assert found.text
    assert best_mix(f"mixed:{bits + 0.3:g}", spec, sensitivity).harm <= found.harm


def test_a_uniform_choice_keeps_the_bound_of_a_worse_solution(
    checkpoint: Checkpoint, sensitivity: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poor(items: Sequence[Sequence[Option]], room: int) -> Choice:
        """Of the smallest options, and said to cost twice as much as they do."""
        options = [min(each, key=lambda option: option.nbytes) for each in items]
        picked = tuple(each.index(option) for each, option in zip(items, options, strict=True))
        cost = sum(option.cost for option in options)
        return Choice(picked, sum(option.nbytes for option in options), 2 * cost, cost / 10)

    monkeypatch.setattr(allocate_module, "solve", poor)
    assert best_mix("mixed:5.4", checkpoint.spec, sensitivity).gap == pytest.approx(0.9)


def test_impossible_bits(checkpoint: Checkpoint, sensitivity: Sensitivity) -> None:
    least, most = bits_range(checkpoint.spec, FORMATS)
    for bits in (least - 0.1, most + 0.1):
        with pytest.raises(OptionError, match="which no formats give; for this model use mixed:") as error:
            best_mix(f"mixed:{bits:.2f}", checkpoint.spec, sensitivity)
        assert "\n" not in str(error.value)


def test_from_the_weights_alone(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    mix = allocate(checkpoint, "mixed:6", progress=lambda *figures: told.append(figures)).mix
    assert mix.check(checkpoint.spec).bits(checkpoint.spec) <= 6
    assert told[-1] == ("measuring", 24, 24)
    path = sensitivity_path(checkpoint)
    kept = Sensitivity.read(path, checkpoint.fingerprint)
    assert kept is not None
    assert kept.text is None
    assert kept.measured(candidates(checkpoint.spec.dtype))
    assert not partial_path(path).exists()
    monkeypatch.setattr(measure, "expert_errors", None)  # kept, so not measured again
    assert allocate(checkpoint, "mixed:6").mix == mix


def test_from_a_text(tiny_mixtral: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the expert router sends each token of the text to the experts it trusts " * 60
    options = {"device": "cpu", "context": 256}
    found = calibrate(tiny_mixtral, text, tokens=600, **options)
    assert found.text is not None
    assert found.tokens == 512
    monkeypatch.setattr(measure, "expert_errors", None)
    assert calibrate(tiny_mixtral, text, tokens=600, **options) == found
    name = "mixed:6"
    assert allocate(checkpoint, name) == best_mix(name, checkpoint.spec, found)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("too short", "tokens, of which 512 are")])
def test_too_little_text(tiny_mixtral: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        calibrate(tiny_mixtral, text)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model(tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ids would be looked up beyond the embeddings."""

    def tokenizer(text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [5] * 600 + [320]}

    monkeypatch.setattr("moe_local.offload.allocation.text.load_tokenizer", lambda *places: tokenizer)
    with pytest.raises(OptionError, match="gives token 320, and the model knows 0 to 319: it is another"):
        calibrate(tiny_mixtral, "word " * 1000)


def test_models_that_read_no_text(make_checkpoint) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match="has no tokenizer"):
        calibrate(make_checkpoint("mixtral"), "text " * 1000)
    with pytest.raises(OptionError, match="encoder-decoder"):
        calibrate(make_checkpoint("switch_transformers"), "text " * 1000)


def test_what_misses_cost_moves_bits_to_where_they_are_seldom_fetched() -> None:
    uses = (0.9, 0.5, 0.4, 0.2)
    shares = hits(uses, 0.5)
    assert sorted(shares, reverse=True) == list(shares)
    assert sum(u * h for u, h in zip(uses, shares, strict=True)) / 2 == pytest.approx(hit_rate(0.5, 4))
    assert hits(uses, 1.0) == (1.0,) * 4
    layer = LayerSensitivity(1.0, uses, {"nf4": (0.01,) * 4})
    costs = MissCost.of(0.1, 1e9, 0.5).costs(Sensitivity("", "", "text", 1, (layer,)), 0)
    assert all(cost > 0 for cost in costs)
    mean = (1 - EVEN) * 0.9 + EVEN * 0.5
    assert costs[0] == pytest.approx(
        mean * (1 - hits([layer.use(e) for e in range(4)], 0.5)[0]) / (1e9 * 0.1 * 5)
    )
    assert MissCost.of(0.1, 1e9, 1.0).costs(Sensitivity("", "", "text", 1, (layer,)), 0) == [0.0] * 4


def test_candidates_are_each_of_use() -> None:
    found = candidates(torch.bfloat16)
    assert found[-1] == "bf16"
    assert candidates(torch.float16)[-1] == "fp16"
    errors = [format_error(name) for name in found[:-1]]
    assert errors == sorted(errors, reverse=True)
    assert {"nf4", "int8"} <= set(found)
