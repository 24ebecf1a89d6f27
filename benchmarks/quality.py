"""What do fewer bits cost, and what does choosing them for each expert save?

    python benchmarks/quality.py demo --json FILE --plot PNG

Method. The model reads texts that it was not calibrated on, in windows of 256 tokens: first with its experts
as they are stored, then with every expert encoded to a format and decoded again. Everything else is unchanged
and in fp32, so that the format alone makes the difference. For each format and each mix:
  KL          KL divergence from the unquantized model's predictions, nats per token
  perplexity  of the text
  top-1       share of tokens whose likeliest successor stays the same
Mixes of a given size are made in three ways:
  even     the two formats nearest in size, alternating, which takes no knowledge of the experts
  weights  by the weights alone, as `moe-local convert --experts mixed:BITS` does
  text     by a calibration text, as with --calibrate
Sizes count all bytes, with scales and padding. Intervals (95 %) are bootstrapped over windows; a mix is
compared with the even mix of its size (which at the size of a format is that format alone) on the same
windows, as a ratio of KL. The demo reads conversations and documentation that it was not trained on, half
each, and is calibrated on others that it was trained on. Other models take --text and --calibrate, by default
Python's documentation.

The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import finish, parser_of
from torch.nn import functional

import moe_local
from moe_local.offload.allocation.allocate import best_mix
from moe_local.offload.allocation.expected import candidates
from moe_local.offload.allocation.measure import Measurement, read_text
from moe_local.offload.allocation.samples import WINDOW, experts_of, rows_of
from moe_local.offload.allocation.sensitivity import Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import resolve
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.quantize.codec import codec_for, codecs
from moe_local.offload.quantize.mix import Mix, bits_range, even_mix, name_of, uniform_bytes

AT_ONCE = 8
"""Windows per forward."""
RESAMPLES = 2000
MOST_BITS = 8.3
"""Largest size in the plot; above it, no difference is visible."""
KEPT_BYTES = 2 << 30
"""Limit on the bytes of decoded experts that are kept; larger models encode theirs again in each forward."""


class Decoded:
    """A runner that encodes each expert to a given format, decodes it and computes it in fp32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.formats: Sequence[Sequence[str]] = ()
        self._checkpoint = checkpoint
        self._kept: dict[tuple[int, int, str], dict[str, torch.Tensor]] = {}
        self._keep = checkpoint.spec.expert_numel * 4 * len(codecs()) < KEPT_BYTES

    def weights(self, layer: int, expert: int, format: str) -> dict[str, torch.Tensor]:
        key = (layer, expert, format)
        if key in self._kept:
            return self._kept[key]
        shape = self._checkpoint.spec.layers[layer]
        codec = codec_for(format)
        layout = codec.layout(shape.tensors)
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        codec.encode(self._checkpoint.read_expert(shape, expert), layout, buffer)
        decoded = codec.decode(buffer, layout, torch.float32)
        if self._keep:
            self._kept[key] = decoded
        return decoded

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' weighted outputs, with the arguments of OffloadedExperts.forward."""
        output = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            rows, ranks = (index == expert).nonzero(as_tuple=True)
            found = self.weights(experts.index, expert, self.formats[experts.index][expert])
            linear = reference_linear(found, experts.has_bias)
            inner = experts.activate(linear(hidden[rows], "gate_up_proj" if experts.has_gate else "up_proj"))
            answer = experts.finish(linear(inner, "down_proj"))
            output.index_add_(0, rows, answer * weights[rows, ranks, None])
        return output


@dataclass(frozen=True)
class Scores:
    """KL divergence, loss in nats, and top-1 agreement: means over the tokens of each window, [N]."""

    kl: torch.Tensor
    nats: torch.Tensor
    top: torch.Tensor


class Judge:
    """Compares the model with experts in given formats with the unquantized model, on some windows."""

    def __init__(
        self, hf: Any, decoded: Decoded, windows: torch.Tensor, groups: Sequence[str], exact: str
    ) -> None:
        """`groups`: the name of each window's text. `exact`: the format that keeps the weights unchanged."""
        self.windows, self.groups = windows, groups
        self._hf, self._decoded = hf, decoded
        self.exact = [[exact] * layer.num_experts for layer in decoded._checkpoint.spec.layers]
        self._reference = list(self._logs(self.exact))

    @torch.inference_mode()
    def _logs(self, formats: Sequence[Sequence[str]]) -> Iterator[torch.Tensor]:
        self._decoded.formats = formats
        for batch in self.windows.split(AT_ONCE):
            yield self._hf(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)

    def scores(self, formats: Sequence[Sequence[str]]) -> Scores:
        kl, nats, top = [], [], []
        batches = self.windows.split(AT_ONCE)
        for ids, exact, found in zip(batches, self._reference, self._logs(formats), strict=True):
            kl.append((exact.exp() * (exact - found)).sum(-1).mean(1))
            losses = functional.nll_loss(found[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            nats.append(losses.mean(1))
            top.append((exact.argmax(-1) == found.argmax(-1)).float().mean(1))
        return Scores(torch.cat(kl), torch.cat(nats), torch.cat(top))

    def perplexity(self, scores: Scores) -> dict[str, float]:
        return {
            name: math.exp(float(scores.nats[torch.tensor([g == name for g in self.groups])].mean()))
            for name in sorted(set(self.groups))
        }


def resampled(count: int) -> torch.Tensor:
    """Indices of bootstrap samples, [RESAMPLES, count]."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def interval(values: torch.Tensor) -> list[float]:
    """The 95 % interval of the mean."""
    means = values.double()[resampled(len(values))].mean(1)
    return [float(means.quantile(q)) for q in (0.025, 0.975)]


def ratio(over: torch.Tensor, under: torch.Tensor) -> dict[str, float]:
    """mean(over) / mean(under) on the same windows, with its 95 % interval."""
    drawn = resampled(len(over))
    found = over.double()[drawn].mean(1) / under.double()[drawn].mean(1)
    low, high = (float(found.quantile(q)) for q in (0.025, 0.975))
    return {"ratio": float(over.double().mean() / under.double().mean()), "low": low, "high": high}


def demo_texts(tokenizer: Any, tokens: int, windows: int) -> tuple[list[int], dict[str, list[int]]]:
    """(calibration ids, evaluation ids of each kind of text)."""
    from moe_local.demo.batches import Encoder
    from moe_local.demo.corpus import Corpus
    from moe_local.demo.documents import documents

    encoder, corpus = Encoder(tokenizer), Corpus()

    def chats(seed: str, count: int) -> list[int]:
        rng, ids = random.Random(seed), list[int]()
        while len(ids) < count:
            ids += encoder.conversation(corpus.conversation(rng))[0]
        return ids[:count]

    seen, held_out = documents()
    chat, prose = chats("calibration", tokens), encoder.stream(seen[:400]).tolist()
    pieces = [text[at : at + WINDOW] for at in range(0, tokens // 2, WINDOW) for text in (chat, prose)]
    count = windows * WINDOW
    judged = {"conversations": chats("held out", count), "documentation": encoder.stream(held_out).tolist()}
    return [token for piece in pieces for token in piece], {n: ids[:count] for n, ids in judged.items()}


def texts(model: moe_local.Model, options: argparse.Namespace) -> tuple[list[int], dict[str, list[int]]]:
    from moe_local.demo.documents import documents

    if model.name == "demo" and options.text is None:
        return demo_texts(model.tokenizer, options.tokens, options.windows)
    calibration = options.calibrate.read_text() if options.calibrate else "\n\n".join(documents()[0])
    text = options.text.read_text() if options.text else "\n\n".join(documents()[1])
    count = options.windows * WINDOW
    assert model.tokenizer is not None
    ids = [
        model.tokenizer(part[: 16 * most], add_special_tokens=False)["input_ids"][:most]
        for part, most in ((calibration, options.tokens), (text, count))
    ]
    return ids[0], {"text": ids[1]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = Checkpoint.open(resolve(options.model), options.model)
    spec = checkpoint.spec
    with moe_local.load(
        options.model, experts="native", dense="fp32", device="cpu", prefetch="off", context=WINDOW
    ) as model:
        calibration, judged = texts(model, options)
        reading = read_text(model.hf, calibration)
        decoded = Decoded(checkpoint)
        for module in experts_of(model.hf):
            module.attach(decoded)
        rows = {name: rows_of(ids, len(ids)) for name, ids in judged.items()}
        groups = [name for name, windows in rows.items() for _ in windows]
        kept = candidates(spec.dtype)[-1]
        judge = Judge(model.hf, decoded, torch.cat(list(rows.values())), groups, kept)
        formats = [name for name, codec in codecs().items() if not codec.exact]
        with tempfile.TemporaryDirectory() as folder:
            known = {
                kind: Measurement(
                    checkpoint, [*formats, kept], read, Path(folder) / "partial", torch.device("cpu")
                ).run()
                for kind, read in (("text", reading), ("weights", None))
            }
        rows_out, scores = list[dict[str, Any]](), dict[str, Scores]()
        for name, kind, bits, assigned in assignments(spec, formats, known, options.bits):
            mine = scores[name] = judge.scores(assigned)
            low, high = interval(mine.kl)
            rows_out.append(
                {
                    "name": name,
                    "kind": kind,
                    "bits": bits,
                    "formats": {f: sum(row.count(f) for row in map(list, assigned)) for f in codecs()},
                    "kl": {"mean": float(mine.kl.mean()), "low": low, "high": high},
                    "kl_expected": known["text"].expected(assigned),
                    "perplexity": judge.perplexity(mine),
                    "top1": float(mine.top.mean()),
                }
            )
            print(line(rows_out[-1]), flush=True)
        pairs = []
        for row in rows_out:
            even = f"{row['name'].split()[0]} even"
            if row["kind"] in ("weights", "text"):
                found = ratio(scores[row["name"]].kl, scores[even].kl)
                pairs.append({"mix": row["name"], "against": even, "bits": row["bits"], **found})
        exact = judge.scores(judge.exact)
        return {
            "benchmark": "quality",
            "model": model.name,
            "windows": len(groups),
            "calibration_tokens": len(calibration),
            "unquantized": {"perplexity": judge.perplexity(exact), "bits": bits_range(spec, [kept])[1]},
            "rows": rows_out,
            "pairs": pairs,
        }


def assignments(
    spec: Any, formats: Sequence[str], known: dict[str, Sensitivity], grid: Sequence[float]
) -> Iterator[tuple[str, str, float, Sequence[Sequence[str]]]]:
    """(name, kind, bits per weight, formats[layer][expert]) of every assignment that is compared."""
    uniform = {name: 8 * uniform_bytes(spec, name) / spec.expert_numel for name in formats}
    for name, bits in sorted(uniform.items(), key=lambda item: item[1]):
        yield name, "uniform", bits, [[name] * layer.num_experts for layer in spec.layers]
    candidate = [name for name in candidates(spec.dtype) if name in formats]
    low, high = bits_range(spec, candidate)
    sizes = {round(bits + 0.0005, 3) for bits in (*uniform.values(), *grid) if low < bits + 0.0005 < high}
    for size in sorted(sizes):
        name = name_of(size)
        mixes: dict[str, Mix] = {"even": even_mix(name, spec, candidate)}
        mixes |= {kind: best_mix(name, spec, known[kind]).mix for kind in ("weights", "text")}
        for kind, mix in mixes.items():
            yield f"{name} {kind}", kind, mix.bits(spec), mix.formats


def line(row: dict[str, Any]) -> str:
    perplexity = "  ".join(f"{name} {value:.3f}" for name, value in row["perplexity"].items())
    kl = row["kl"]
    return (
        f"{row['name']:22s} {row['bits']:6.3f} bits  KL {kl['mean']:.5f}"
        f" ({kl['low']:.5f} to {kl['high']:.5f})  top-1 {row['top1']:.2%}  perplexity {perplexity}"
    )


def draw(document: dict[str, Any], path: Path) -> None:
    """Plot KL divergence and perplexity over bits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [row for row in document["rows"] if row["bits"] <= MOST_BITS]
    styles = {
        "even": ("#BBBBBB", "dealt out evenly", "--"),
        "weights": ("#4477AA", "chosen by the weights", "-"),
        "text": ("#EE6677", "chosen by a text", "-"),
    }
    best = max(document["unquantized"]["perplexity"], key=document["unquantized"]["perplexity"].__getitem__)
    for kind, (colour, label, style) in styles.items():
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["bits"])
        bits = [row["bits"] for row in mine]
        kl = [row["kl"]["mean"] for row in mine]
        spread = [
            [row["kl"]["mean"] - row["kl"]["low"] for row in mine],
            [row["kl"]["high"] - row["kl"]["mean"] for row in mine],
        ]
        left.errorbar(bits, kl, spread, color=colour, label=label, ls=style, marker="o", ms=4, capsize=2)
        right.plot(
            bits,
            [row["perplexity"][best] for row in mine],
            color=colour,
            label=label,
            ls=style,
            marker="o",
            ms=4,
        )
    for row in rows:
        if row["kind"] == "uniform":
            for axes, value in ((left, row["kl"]["mean"]), (right, row["perplexity"][best])):
                axes.plot(row["bits"], value, "kx", ms=7)
                axes.annotate(row["name"], (row["bits"], value), textcoords="offset points", xytext=(5, 5))
    left.set(yscale="log", xlabel="bits a weight", ylabel="nats a token", title="KL divergence")
    right.axhline(document["unquantized"]["perplexity"][best], color="black", lw=1, label="unquantized")
    right.set(xlabel="bits a weight", title=f"Perplexity, {best}")
    left.legend()
    right.legend()
    figure.suptitle(f"{document['model']}: experts in fewer bits (x: one format for all)")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="a text to judge by")
    parser.add_argument("--calibrate", type=Path, help="a text to choose by")
    parser.add_argument("--windows", type=int, default=48, help="of 256 tokens, of each text")
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text")
    parser.add_argument(
        "--bits", type=float, nargs="*", default=[2.75, 3.0, 3.25, 3.5, 3.75, 4.5, 5.0, 6.0, 7.0]
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    document = measure(options)
    for pair in document["pairs"]:
        print(f"{pair['mix']:22s} KL {pair['ratio']:.2f} ({pair['low']:.2f} to {pair['high']:.2f}) of even")
    if options.plot:
        draw(document, options.plot)
    finish(document, options.json)


if __name__ == "__main__":
    main()
