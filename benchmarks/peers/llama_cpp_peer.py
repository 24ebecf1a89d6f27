"""llama.cpp as a peer: loads a GGUF file and answers over the pipe (serve.py), by llama.cpp's C interface.

All settings are its defaults, which are its best after some hundred tokens: weights repacked for this
processor during loading, flash attention, 512 prompt tokens per forward. The only change is that prefill and
decoding use every core. After thousands of tokens it decodes faster on a CPU with --flash-attention off
(docs/log.md). With --n-cpu-moe N the model is on the GPU except for the experts of the first N layers, as
with llama.cpp's own option of this name (which makes the same overrides). With --mapped the weights are read
from the page cache and not repacked: repacking copies them to memory, which a large file may not fit. With
--parallel N it answers up to N prompts at once (llama_cpp_batch.py). Runs in the environment that install.py
makes.

    python llama_cpp_peer.py FILE.gguf --context 1024 [--flash-attention off] [--n-cpu-moe 12] [--mapped]
"""

from __future__ import annotations

import argparse
import ctypes
import os
from typing import Any

import gguf
import llama_cpp as c
from llama_cpp import _ggml
from llama_cpp_batch import Rows
from serve import Pipe

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""llama_flash_attn_type by the values of llama.cpp's option."""


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override: tensors whose names match the pattern go to this type of memory."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def experts_on_cpu(layers: int) -> ctypes.Array[Override]:
    """Overrides that keep the experts of the first `layers` layers in RAM, ended by an empty override."""
    cpu = _ggml.libggml.ggml_backend_cpu_buffer_type
    cpu.restype = ctypes.c_void_p
    where = cpu()
    patterns = [rf"blk\.{layer}\.ffn_(up|down|gate)_exps" for layer in range(layers)]
    entries = [Override(pattern.encode(), where) for pattern in patterns]
    return (Override * (layers + 1))(*entries, Override(None, None))


class LlamaCpp:
    """One model and one sequence, or several, which are in `rows`."""

    def __init__(
        self,
        path: str,
        context: int,
        threads: int,
        n_cpu_moe: int | None,
        mapped: bool = False,
        flash_attention: str = "auto",
        sequences: int = 1,
    ) -> None:
        """`n_cpu_moe`: number of layers whose experts stay in RAM, with all else on the GPU; None: no GPU is
        used."""
        c.llama_backend_init()
        load = c.llama_model_default_params()
        load.n_gpu_layers = 0 if n_cpu_moe is None else 999
        self._overrides = experts_on_cpu(n_cpu_moe or 0)  # kept, since llama.cpp has pointers to it
        load.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        if n_cpu_moe:
            load.load_mode = c.LLAMA_LOAD_MODE_NONE  # pinned, not mapped, as llama.cpp advises with overrides
        if mapped:
            load.load_mode = c.LLAMA_LOAD_MODE_MMAP
            load.use_extra_bufts = False
        self._model = c.llama_model_load_from_file(path.encode(), load)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = context  # a prompt in one call, 512 tokens (n_ubatch) in one forward
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        self.rows: Rows | None = None
        """Sequences that are continued together; None: `first` and `following` compute one."""
        if sequences > 1:
            params.n_seq_max, params.n_ctx, params.kv_unified = sequences, sequences * context, False
            self.rows = Rows(self._model, params)
            return
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens")
        self._greedy = c.llama_sampler_init_greedy()
        self._next = (c.llama_token * 1)()

    def first(self, prompt: list[int]) -> int:
        """Compute a prompt from an empty context; returns the likeliest next id."""
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        return self._decode((c.llama_token * len(prompt))(*prompt))

    def following(self, token: int) -> int:
        """Compute one more id; returns the likeliest next one."""
        self._next[0] = token
        return self._decode(self._next)

    def _decode(self, ids: ctypes.Array[Any]) -> int:
        status = c.llama_decode(self._context, c.llama_batch_get_one(ids, len(ids)))
        if status != 0:
            raise SystemExit(f"llama_decode of {len(ids)} tokens failed with {status}")
        return int(c.llama_sampler_sample(self._greedy, self._context, -1))

    def logits(self) -> list[float]:
        """The logits of the last computed position."""
        size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        return list(c.llama_get_logits_ith(self._context, -1)[:size])


def weights(path: str) -> dict[str, int]:
    """The weights that one decoded token reads: its experts, and all others except the input embedding."""
    reader = gguf.GGUFReader(path)
    family = reader.fields["general.architecture"].contents()
    used, count = (
        reader.fields[f"{family}.{key}"].contents() for key in ("expert_used_count", "expert_count")
    )
    read = {"expert_bytes": 0, "expert_numel": 0, "dense_bytes": 0, "dense_numel": 0}
    for tensor in reader.tensors:
        kind, share = ("expert", used / count) if "_exps." in tensor.name else ("dense", 1)
        if tensor.name != "token_embd.weight":
            read[f"{kind}_bytes"] += int(tensor.n_bytes * share)
            read[f"{kind}_numel"] += int(tensor.n_elements * share)
    return read


def name(options: argparse.Namespace) -> str:
    words = ["llama.cpp"]
    if options.n_cpu_moe is not None:
        words.append(f"n-cpu-moe {options.n_cpu_moe}")
    if options.mapped:
        words.append("mapped")
    if options.flash_attention != "auto":
        words.append(f"flash attention {options.flash_attention}")
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts with llama.cpp over stdin and stdout.")
    parser.add_argument("model", metavar="FILE.gguf")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--n-cpu-moe", type=int, help="on the GPU, but for the experts of so many layers")
    parser.add_argument("--mapped", action="store_true", help="do not copy weights into memory")
    parser.add_argument("--flash-attention", choices=FLASH_ATTENTION, default="auto")
    parser.add_argument("--parallel", type=int, default=1, help="sequences that are continued together")
    options = parser.parse_args()
    pipe = Pipe()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = LlamaCpp(
        options.model,
        options.context,
        threads,
        options.n_cpu_moe,
        options.mapped,
        options.flash_attention,
        options.parallel,
    )
    hello = {
        "name": name(options),
        "version": f"llama-cpp-python {c.__version__}",
        "detail": c.llama_print_system_info().decode().strip(),
        "threads": threads,
        "weights": weights(options.model),
    }
    if model.rows is not None:
        pipe.serve(hello, model.rows.first, model.rows.following, review=model.rows.review)
    else:
        pipe.serve(hello, model.first, model.following)


if __name__ == "__main__":
    main()
