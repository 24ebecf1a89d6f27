"""Measures a checkpoint's Sensitivity: a text is read, then every expert is encoded in every format."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from moe_local.cache.errors import OptionError
from moe_local.offload.allocation.errors import Errors, expert_errors
from moe_local.offload.allocation.gains import layer_gains, texts_of
from moe_local.offload.allocation.samples import (
    FEWEST_INPUTS,
    WINDOW,
    LayerSamples,
    Watch,
    experts_of,
    rows_of,
)
from moe_local.offload.allocation.sensitivity import LayerSensitivity, Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.spec import MoELayer, experts_modules, meta_model
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.system.direct_io import PageArena
from moe_local.offload.system.progress import Progress

TOKENS = 8192
"""Tokens of a text that are read by default."""
FEWEST_TOKENS = 2 * WINDOW
AT_ONCE = 8
"""Windows in one forward: 2048 tokens, for which every expert is read once."""
GAIN_TEXTS = 16
"""Rows of text with which noise is tried in every layer."""
MADE_INPUTS = 32
"""Random inputs for each expert where there is no text."""
SAVE_SECONDS = 20.0
FIRST_LAYERS, FIRST_GAIN = 8, 3.0
"""Without a text, errors in the first 1 / FIRST_LAYERS of the layers are assumed to harm FIRST_GAIN times as
much, since later layers pass them on: the first of the demo model's five layers harms three to five times as
much as the others; QuantMoE-Bench (arXiv 2406.08155) and llama.cpp's mixes give the first blocks more bits,
too."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a text showed."""

    text: str
    """Name of the text."""
    tokens: int
    samples: Sequence[LayerSamples]
    gains: Sequence[float]


def text_name(ids: Sequence[int]) -> str:
    """A name for the part of a text that is read: equal for equal ids."""
    return xxhash.xxh3_64_hexdigest(",".join(map(str, ids)).encode())


def check_text(ids: Sequence[int], vocab_size: int) -> None:
    """Raises OptionError for too little text, and for ids of another model's tokenizer."""
    if not ids:
        raise OptionError("the text to calibrate on is empty; give one like what the model will read")
    if len(ids) < FEWEST_TOKENS:
        raise OptionError(
            f"the text to calibrate on has {len(ids)} tokens, of which {FEWEST_TOKENS} are the least; "
            "give a longer one, or none (then the weights alone decide)"
        )
    if max(ids) >= vocab_size:
        raise OptionError(
            f"the tokenizer gives token {max(ids)}, and the model knows 0 to {vocab_size - 1}: it is another "
            "model's; put the right one into the checkpoint's folder"
        )


def read_text(hf: Any, ids: Sequence[int], progress: Progress | None = None) -> Reading:
    """Let a loaded model (Model.hf) read a text: sample its experts' inputs, and measure what noise does.

    Raises OptionError for too little text.
    """
    check_text(ids, hf.get_input_embeddings().num_embeddings)
    batches = rows_of(ids, len(ids)).split(AT_ONCE)
    with Watch(experts_of(hf)) as watch, torch.inference_mode():
        for done, batch in enumerate(batches, 1):
            hf.base_model(input_ids=batch.to(hf.device), use_cache=False)  # logits are not needed
            if progress is not None:
                progress("reading text with", done, len(batches))

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("trying noise in", done, total)

    gains = layer_gains(hf, texts_of(ids, GAIN_TEXTS), progress=report)
    return Reading(text_name(ids), watch.layers[0].tokens, watch.layers, gains)


class Measurement:
    """Measures the Sensitivity of one checkpoint, layer by layer, and saves it at `partial` now and then.

    A measurement that was killed resumes after the last saved layer, if it is repeated with the same reading.
    Memory: one expert as it is stored, and a few times in fp32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Sequence[str],
        reading: Reading | None,
        partial: Path,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """`device`: where to compute."""
        self._checkpoint = checkpoint
        self._formats = tuple(formats)
        self._reading = reading
        self._partial = partial
        self._device = device
        self._progress = progress
        model = meta_model(checkpoint.config)
        self._maths = [
            OffloadedExperts(module, index) for index, (_, module) in enumerate(experts_modules(model))
        ]
        self._memory = PageArena()

    def run(self) -> Sensitivity:
        """Measure every expert. Raises CheckpointError for weights that cannot be read or encoded."""
        spec, reading = self._checkpoint.spec, self._reading
        found = self._kept()
        total = sum(layer.num_experts for layer in spec.layers)
        done = sum(len(layer.uses) for layer in found.layers)
        saved = time.monotonic()
        for layer in spec.layers[len(found.layers) :]:
            measured = []
            for expert in range(layer.num_experts):
                measured.append(self._measure(layer, expert))
                done += 1
                if self._progress is not None:
                    self._progress("measuring", done, total)
            found = replace(found, layers=(*found.layers, self._layer(layer, measured)))
            if time.monotonic() - saved > SAVE_SECONDS:
                found.save(self._partial)
                saved = time.monotonic()
        assert reading is None or reading.text == found.text
        self._partial.unlink(missing_ok=True)
        return found

    def _kept(self) -> Sensitivity:
        """The layers that an earlier run of the same measurement saved; none if there was no such run."""
        text = self._reading.text if self._reading is not None else None
        tokens = self._reading.tokens if self._reading is not None else 0
        nothing = Sensitivity(self._checkpoint.name, self._checkpoint.fingerprint, text, tokens, ())
        kept = Sensitivity.read(self._partial, self._checkpoint.fingerprint)
        if kept is None or (kept.text, kept.tokens) != (text, tokens):
            return nothing
        same = all(tuple(layer.errors) == self._formats for layer in kept.layers)
        return kept if same else nothing

    def _measure(self, layer: MoELayer, expert: int) -> Errors:
        self._memory.reset()
        tensors = self._checkpoint.read_expert(layer, expert, self._memory)
        x, weights = self._inputs(layer, expert)
        with torch.inference_mode():
            return expert_errors(
                self._maths[layer.index], layer.tensors, tensors, x, weights, self._formats, self._device
            )

    def _inputs(self, layer: MoELayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the expert, with weights; where there are few, inputs of the layer's others, too."""
        if self._reading is None:
            generator = torch.Generator().manual_seed(layer.index)
            width = self._checkpoint.spec.hidden_size
            x = torch.randn(MADE_INPUTS, width, generator=generator)
            return x, torch.full((MADE_INPUTS,), 1 / layer.top_k)
        samples = self._reading.samples[layer.index]
        x, weights = samples.inputs(expert)
        if len(x) < FEWEST_INPUTS:
            more = samples.others(expert, FEWEST_INPUTS - len(x))
            usual = torch.full((len(more),), samples.usual_weight())
            x, weights = (torch.cat([x, more]), torch.cat([weights, usual])) if len(x) else (more, usual)
        return x, weights

    def _layer(self, layer: MoELayer, measured: Sequence[Errors]) -> LayerSensitivity:
        errors = {name: tuple(each.by_format[name] for each in measured) for name in self._formats}
        if self._reading is not None:
            samples = self._reading.samples[layer.index]
            uses = tuple(count / samples.tokens for count in samples.uses)
            return LayerSensitivity(self._reading.gains[layer.index], uses, errors)
        share = layer.top_k / layer.num_experts
        output = share * math.fsum(each.energy for each in measured)  # outputs of random inputs: orthogonal
        errors = {name: tuple(e / output if output else 0.0 for e in found) for name, found in errors.items()}
        layers = len(self._checkpoint.spec.layers)
        first = -(-layers // FIRST_LAYERS)
        gain = (FIRST_GAIN if layer.index < first else 1.0) / (layers + (FIRST_GAIN - 1) * first)
        return LayerSensitivity(gain, (share,) * layer.num_experts, errors)
