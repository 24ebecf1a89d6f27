"""What rounding activations to eight bits costs: the demo model's perplexity, native against int8.

    python benchmarks/activations.py

Method. The model reads held-out conversations and documents (those of demo/evaluate.py): all of them in whole
windows, which the kernels compute in tiles, and some of them token by token, as single rows. Experts and
dense part are in NF4, so that every matrix goes through the CPU kernel. Prints a table and one JSON object:
the perplexity of each, and the change in per cent.
"""

from __future__ import annotations

import math
import random

import torch
from report import finish, parser_of
from torch.nn import functional

import moe_local
from moe_local.demo.batches import Encoder
from moe_local.demo.corpus import Corpus
from moe_local.demo.documents import documents

WINDOW = 256


def held_out(encoder: Encoder, chats: int, windows: int) -> list[list[int]]:
    """Ids of texts that the demo was not trained on, one list per text."""
    corpus, rng = Corpus(), random.Random("held out")
    texts = [encoder.conversation(corpus.conversation(rng))[0] for _ in range(chats)]
    stream = encoder.stream(documents()[1])[: WINDOW * windows]
    return texts + [part.tolist() for part in stream.split(WINDOW)]


@torch.inference_mode()
def losses(model: moe_local.Model, ids: list[int], *, by_token: bool) -> torch.Tensor:
    """The loss in nats of each token of `ids` except the first."""
    row = torch.tensor([ids])
    if by_token:
        cache, parts = None, []
        for place in range(len(ids) - 1):
            step = model.hf(row[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits[0])
        logits = torch.cat(parts)
    else:
        logits = model.hf(row, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), row[0, 1:], reduction="none")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dense", default="nf4")
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--single", type=int, default=40, help="texts that are also read token by token")
    options = parser.parse_args()
    perplexity: dict[str, dict[str, float]] = {}
    for activations in ("native", "int8"):
        with moe_local.load("demo", device="cpu", dense=options.dense, activations=activations) as model:
            assert model.tokenizer is not None
            texts = held_out(Encoder(model.tokenizer), options.chats, options.windows)
            perplexity[activations] = {
                "windows": mean_perplexity([losses(model, ids, by_token=False) for ids in texts]),
                "single": mean_perplexity(
                    [losses(model, ids, by_token=True) for ids in texts[:: len(texts) // options.single]]
                ),
            }
    change = {
        kind: 100 * (perplexity["int8"][kind] / native - 1) for kind, native in perplexity["native"].items()
    }
    for kind, percent in change.items():
        before, after = perplexity["native"][kind], perplexity["int8"][kind]
        print(f"{kind:8} native {before:.4f}  int8 {after:.4f}  {percent:+.3f} %")
    result = {"benchmark": "activations", "perplexity": perplexity, "change_percent": change}
    finish(result, options.json)


def mean_perplexity(parts: list[torch.Tensor]) -> float:
    return math.exp(float(torch.cat(parts).mean()))


if __name__ == "__main__":
    main()
