"""Several sequences in one llama.cpp context: prompts one after the other, then one batch a step.

Each sequence has a seq_id, and keys and values of its own (`kv_unified` off, as llama.cpp advises for prompts
that have nothing in common).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as c
import numpy as np
from llama_cpp import _ggml

CHOSEN = b"ffn_moe_topk"
"""Name of the tensors [tokens, top-k] with the experts that a layer's router has chosen."""


class Tensor(ctypes.Structure):
    """The first fields of ggml_tensor: sizes and strides, the innermost dimension first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
    )


class Rows:
    """A context of up to `params.n_seq_max` sequences, of which as many are used as there are prompts. Does
    not own the model."""

    def __init__(self, model: Any, params: Any) -> None:
        self._model, self._params = model, params
        self._context = c.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {params.n_seq_max} sequences")
        self._batch = c.llama_batch_init(params.n_batch, 0, 1)
        self._lengths: list[int] = []
        self._words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def first(self, prompts: list[list[int]]) -> list[int]:
        """Compute the prompts, one after the other, from an empty context; returns the likeliest next ids."""
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        found = []
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            self._decode([(token, i, sequence, i == last) for i, token in enumerate(prompt)])
            found.append(self._likeliest(last))
        self._lengths = [len(prompt) for prompt in prompts]
        return found

    def following(self, tokens: list[int]) -> list[int]:
        """Compute one more id of each sequence, in one batch; returns the likeliest next ones."""
        self._decode([(token, self._lengths[i], i, True) for i, token in enumerate(tokens)])
        self._lengths = [length + 1 for length in self._lengths]
        return [self._likeliest(i) for i in range(len(tokens))]

    def review(self, prompts: list[list[int]], steps: list[list[int]]) -> dict[str, float]:
        """Compute the steps once more and count how many different experts they used, summed over layers.

        In a context of its own, since llama.cpp is slower while somebody looks at its tensors."""
        chosen = Chosen()
        self._params.cb_eval = chosen.callback
        rows = Rows(self._model, self._params)
        self._params.cb_eval = c.ggml_backend_sched_eval_callback()
        rows.first(prompts)
        chosen.experts = 0
        for tokens in steps[:-1]:
            rows.following(tokens)
        rows.close()
        return {"experts_per_step": chosen.experts / (len(steps) - 1)}

    def close(self) -> None:
        c.llama_batch_free(self._batch)
        c.llama_free(self._context)

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute tokens: (id, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = c.llama_decode(self._context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode of {len(tokens)} tokens failed with {status}")

    def _likeliest(self, index: int) -> int:
        logits = c.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._words,)).argmax())


class Chosen:
    """Looks at the routers' choices while a context computes. `experts` adds up, over forwards and layers,
    how many different ones were chosen."""

    def __init__(self) -> None:
        self.experts = 0
        self.callback = c.ggml_backend_sched_eval_callback(self._look)
        base = ctypes.CDLL(str(_ggml.libggml_base_path / "libggml-base.so"))
        self._name, self._data = base.ggml_get_name, base.ggml_get_data
        self._name.argtypes = self._data.argtypes = (ctypes.c_void_p,)
        self._name.restype, self._data.restype = ctypes.c_char_p, ctypes.c_void_p

    def _look(self, tensor: int, asked: bool, _: Any) -> bool:
        if not self._name(tensor).startswith(CHOSEN):
            return not asked
        if not asked:
            about = Tensor.from_address(tensor)
            data, (count, tokens), stride = self._data(tensor), about.sizes[:2], about.strides[1]
            row = ctypes.c_int32 * count
            self.experts += len({i for t in range(tokens) for i in row.from_address(data + t * stride)})
        return True
