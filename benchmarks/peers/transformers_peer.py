"""transformers as a peer: the checkpoint in bfloat16, all of it in RAM, by its own forward and cache.

With --vram, weights of up to that many bytes are on the GPU, and accelerate copies the rest from RAM when it
is needed, as with `device_map="auto"`. With --ram, that many bytes stay in RAM, and accelerate reads the rest
from the folder --offload, which it writes first. With --random, weights are made here in the checkpoint's
shapes.

Greedy decoding is written out here instead of using `generate`, whose overhead of milliseconds per token
would count against transformers.

    python transformers_peer.py CHECKPOINT [--vram BYTES] [--ram BYTES --offload FOLDER] [--random]
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import transformers
from serve import Pipe

CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
"""What configs call the number of experts that compute a token."""


class Transformers:
    """One model and one sequence."""

    def __init__(
        self,
        folder: str,
        *,
        vram: int | None = None,
        ram: int | None = None,
        offload: str | None = None,
        random: bool = False,
    ) -> None:
        """`vram`: bytes of VRAM that weights may take; None: no GPU is used. `ram`: bytes of RAM that they
        may take; None: no limit."""
        transformers.utils.logging.disable_progress_bar()
        memory: Memory = None if vram is None else {0: vram, "cpu": 1 << 50}
        if ram is not None:
            memory = {"cpu": ram}
        self.model: Any = made(folder, memory) if random else loaded(folder, memory, offload)
        self.model.eval()
        self._device = "cpu" if vram is None else "cuda:0"
        self._past: Any = None

    def first(self, prompt: list[int]) -> int:
        """Compute a prompt from an empty cache; returns the likeliest next id."""
        self._past = transformers.DynamicCache(config=self.model.config)
        return self._forward(prompt)

    def following(self, token: int) -> int:
        """Compute one more id; returns the likeliest next one."""
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> int:
        tokens = torch.tensor([ids], device=self._device)
        logits = self.model(tokens, past_key_values=self._past, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


Memory = dict[int | str, int] | None
"""Bytes that weights may take on each device; None: all weights are in RAM."""


def loaded(folder: str, memory: Memory, offload: str | None = None) -> Any:
    where = {} if memory is None else {"device_map": "auto", "max_memory": memory, "offload_folder": offload}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, **where
    )


def made(folder: str, memory: Memory) -> Any:
    """The model of a config.json with random weights: normal numbers, scaled so that a matrix's output is as
    large as its input; norms are ones."""
    import accelerate

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 24, generator=generator).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        shape = parameter.shape
        if len(shape) == 1:
            value = torch.ones(shape, dtype=torch.bfloat16)
        else:  # the same numbers again, since drawing billions would take longer than the benchmark
            value = numbers.repeat(-(-shape.numel() // numbers.numel()))[: shape.numel()].view(shape)
            value = value / math.sqrt(shape[-1])
        accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value)
    model.tie_weights()
    if memory is None:
        return model
    where = accelerate.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules
    )
    return accelerate.dispatch_model(model, where)


def weights(model: Any) -> dict[str, int]:
    """The weights that one decoded token reads: its experts, and all others except the input embedding."""
    config = model.config.get_text_config(decoder=True)
    chosen = next(n for name in CHOSEN if isinstance(n := getattr(config, name, None), int))
    read = {"expert_bytes": 0, "expert_numel": 0, "dense_bytes": 0, "dense_numel": 0}
    table = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter is table:
            continue
        expert = ".experts." in name
        share = chosen / len(parameter) if expert else 1  # [experts, ...], of whatever name in the config
        kind = "expert" if expert else "dense"
        read[f"{kind}_bytes"] += int(parameter.nbytes * share)
        read[f"{kind}_numel"] += int(parameter.numel() * share)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts with transformers over stdin and stdout.")
    parser.add_argument("model", metavar="CHECKPOINT")
    parser.add_argument("--vram", type=int, help="bytes of the GPU that weights may take")
    parser.add_argument("--ram", type=int, help="bytes of RAM that weights may take")
    parser.add_argument("--offload", help="folder for what finds no place there")
    parser.add_argument("--random", action="store_true", help="make weights, read only the shapes")
    options = parser.parse_args()
    pipe = Pipe()
    peer = Transformers(
        options.model, vram=options.vram, ram=options.ram, offload=options.offload, random=options.random
    )
    hello = {
        "name": "transformers" if options.vram is options.ram is None else "transformers, accelerate",
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "detail": f"bfloat16, experts {peer.model.config._experts_implementation}",
        "threads": torch.get_num_threads(),
        "weights": weights(peer.model),
    }
    pipe.serve(hello, peer.first, peer.following)


if __name__ == "__main__":
    main()
