"""transformers as a peer: the checkpoint in bfloat16, all of it in RAM, by its own forward and cache.

Greedy decoding is written out here rather than left to `generate`, whose own milliseconds a token would count
against it.

    python transformers_peer.py CHECKPOINT
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from serve import Pipe


class Transformers:
    """One model and one sequence."""

    def __init__(self, folder: str) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self._past: Any = None

    def first(self, prompt: list[int]) -> int:
        """Compute a prompt from an empty cache; the likeliest id behind it."""
        self._past = transformers.DynamicCache(config=self.model.config)
        return self._forward(prompt)

    def following(self, token: int) -> int:
        """Compute one more id; the likeliest behind it."""
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> int:
        logits = self.model(torch.tensor([ids]), past_key_values=self._past, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


def weights(model: Any) -> dict[str, int]:
    """What one decoded token reads: its experts, and all else but the input embedding."""
    config = model.config
    read = {"expert_bytes": 0, "expert_numel": 0, "dense_bytes": 0, "dense_numel": 0}
    table = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter is table:
            continue
        expert = ".experts." in name
        share = config.num_experts_per_tok / config.num_local_experts if expert else 1
        kind = "expert" if expert else "dense"
        read[f"{kind}_bytes"] += int(parameter.nbytes * share)
        read[f"{kind}_numel"] += int(parameter.numel() * share)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts with transformers over stdin and stdout.")
    parser.add_argument("model", metavar="CHECKPOINT")
    options = parser.parse_args()
    pipe = Pipe()
    peer = Transformers(options.model)
    hello = {
        "name": "transformers",
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "detail": f"bfloat16, experts {peer.model.config._experts_implementation}",
        "threads": torch.get_num_threads(),
        "weights": weights(peer.model),
    }
    pipe.serve(hello, peer.first, peer.following)


if __name__ == "__main__":
    main()
