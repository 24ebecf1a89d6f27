"""What do formats do to the answers of full-width experts, and what is choosing formats for each worth there?

    python benchmarks/quality_wide.py --json FILE

Method. Experts with the width of Mixtral 8x7B's (three matrices of 4096 x 14336, 176 million weights) are
made of random weights: normal ones, ones of Student's t distribution with 5 degrees of freedom, whose tails
are like those of trained weights, and with 3, like those of the worst layers. Each is encoded in each format,
and the error of its answers to 32 random inputs is measured: the squared norm of the change over that of the
answer. Then a model is assumed: 32 layers of 8 experts, each of one of the three kinds at random (half of
them t(5)), whose answers differ in norm (a spread of 0.5 in the logarithm), and which are used as often as
Mixtral's experts are (0.7 to 1.4 times the average) or as unevenly as those of models with many experts (by
Zipf's law with exponent 0.65, OLMoE's). For every size, its expected error is compared between even mixes,
which alternate two formats, and mixes chosen by the solver that `moe-local convert` uses. No model is run:
all layers have the same weight.

The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from report import finish, parser_of

from moe_local.offload.allocation.allocate import best_mix
from moe_local.offload.allocation.errors import expert_errors
from moe_local.offload.allocation.expected import candidates
from moe_local.offload.allocation.sensitivity import LayerSensitivity, Sensitivity
from moe_local.offload.checkpoint.hub import config_of
from moe_local.offload.checkpoint.spec import ModelSpec, experts_modules, meta_model, model_spec
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.quantize.codec import codecs
from moe_local.offload.quantize.mix import bits_range, even_mix, name_of

KINDS: dict[str, int | None] = {"normal": None, "t(5)": 5, "t(3)": 3}
"""Degrees of freedom of each kind; None: normal."""
INPUTS = 32
GRID = (2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 6.0)
SHARES = (0.25, 0.5, 0.25)


def weights(shape: tuple[int, ...], degrees: int | None, generator: torch.Generator) -> torch.Tensor:
    """A matrix of bf16 weights, scaled so that its output is as large as its input."""
    found = torch.randn(shape, generator=generator)
    if degrees is not None:
        squares = torch.zeros(shape)
        for _ in range(degrees):
            squares.add_(torch.randn(shape, generator=generator).square_())
        found /= squares.div_(degrees).sqrt_()
        found *= ((degrees - 2) / degrees) ** 0.5
    return found.div_(shape[1] ** 0.5).to(torch.bfloat16)


def measured(spec: ModelSpec, math: OffloadedExperts, formats: list[str]) -> dict[str, dict[str, float]]:
    """The relative squared error of an expert's answers, by kind and format."""
    found = {}
    for kind, degrees in KINDS.items():
        generator = torch.Generator().manual_seed(0)
        layer = spec.layers[0]
        tensors = {tensor.name: weights(tensor.shape, degrees, generator) for tensor in layer.tensors}
        x = torch.randn(INPUTS, spec.hidden_size, generator=generator)
        with torch.inference_mode():
            errors = expert_errors(
                math, layer.tensors, tensors, x, torch.ones(INPUTS), formats, torch.device("cpu")
            )
        found[kind] = {name: error / errors.energy for name, error in errors.by_format.items()}
        print(kind, "  ".join(f"{name} {error:.5f}" for name, error in found[kind].items()), flush=True)
    return found


def made_model(spec: ModelSpec, errors: dict[str, dict[str, float]], skew: float | None) -> Sensitivity:
    """The sensitivity of a model of such experts. `skew`: Zipf's exponent for their use; None: Mixtral's
    spread of use."""
    chance, layers = random.Random(0), []
    for layer in spec.layers:
        count = layer.num_experts
        kinds = chance.choices(list(KINDS), SHARES, k=count)
        energies = [chance.lognormvariate(0, 0.5) ** 2 for _ in range(count)]
        uses = [chance.uniform(0.7, 1.4) if skew is None else (n + 1) ** -skew for n in range(count)]
        chance.shuffle(uses)
        uses = [layer.top_k * use / sum(uses) for use in uses]
        output = sum(use * energy for use, energy in zip(uses, energies, strict=True))
        layers.append(
            LayerSensitivity(
                1 / len(spec.layers),
                tuple(uses),
                {
                    name: tuple(errors[k][name] * e / output for k, e in zip(kinds, energies, strict=True))
                    for name in errors["normal"]
                },
            )
        )
    return Sensitivity("made", "", None, 0, tuple(layers))


def compare(spec: ModelSpec, sensitivity: Sensitivity, formats: list[str]) -> list[dict[str, Any]]:
    low, high = bits_range(spec, formats)
    uniform = [bits_range(spec, [name])[0] for name in formats]
    rows = []
    for bits in sorted({round(b + 0.0005, 3) for b in (*GRID, *uniform) if low < b + 0.0005 < high}):
        found = best_mix(name_of(bits), spec, sensitivity)
        even = even_mix(name_of(bits), spec, formats)
        rows.append(
            {
                "bits": found.bits,
                "chosen": found.harm,
                "even": sensitivity.expected(even.formats),
                "ratio": found.harm / found.even_harm,
                "gap": found.gap,
                "formats": found.mix.counts(),
            }
        )
        ratio, counts = rows[-1]["ratio"], rows[-1]["formats"]
        print(f"  {bits:.3f} bits  error {found.harm:.5f}  {ratio:.2f} of even  {counts}")
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="mixtral-8x7b", help="whose shape")
    options = parser.parse_args()
    config = config_of(options.model)
    spec = model_spec(config)
    _, module = next(iter(experts_modules(meta_model(config))))
    chosen = [name for name in candidates(spec.dtype) if not codecs()[name].exact]
    every = [name for name, codec in codecs().items() if not codec.exact]
    errors = measured(spec, OffloadedExperts(module, 0), every)
    document: dict[str, Any] = {"benchmark": "quality_wide", "model": options.model, "errors": errors}
    few = {kind: {name: by[name] for name in chosen} for kind, by in errors.items()}
    for name, skew in (("even use", None), ("skewed use", 0.65)):
        print(name)
        document[name] = compare(spec, made_model(spec, few, skew), chosen)
    finish(document, options.json)


if __name__ == "__main__":
    main()
