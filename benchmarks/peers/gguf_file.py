"""Write a checkpoint (safetensors, transformers' names) as a GGUF file of llama.cpp.

All matrices have one type, input embedding and output head included, but for the experts of gpt-oss, which
are MXFP4; norms, routers and biases are float32. The file has no tokenizer: prompts are token ids.
gguf_architectures.py has the families of models.

With --random the weights are made here, in a checkpoint's shapes and at about its scale, without reading any:
a model that is only measured need not be written in bf16 first.

Runs in the peer's environment, which has numpy and the `gguf` package but neither torch nor moe_local.

    python gguf_file.py CHECKPOINT OUT.gguf [--type Q4_0] [--random]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from gguf_architectures import ARCHITECTURES, describe, tensors
from gguf_tensor import FLOAT32, Safetensors, make, make_random


def write(
    folder: Path, out: Path, matrices: gguf.GGMLQuantizationType, threads: int = 2, *, random: bool = False
) -> None:
    """Write `out` from the checkpoint in `folder`, or with `random` from its config.json alone.

    Needs memory for one stacked tensor and its quantized form. `out` appears only once it is complete. Raises
    ValueError for a model type that is not in ARCHITECTURES, and for a model that llama.cpp does not compute.
    """
    config = json.loads((folder / "config.json").read_text())
    multimodal = "text_config" in config  # only the model of text is written
    config = config["text_config"] if multimodal else config
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        *most, last = ARCHITECTURES
        known = f"{', '.join(most)} and {last}"
        raise ValueError(f"{folder} holds a {kind!r}; only {known} are written as GGUF")
    source = Safetensors(folder, "model.language_model." if multimodal else ARCHITECTURES[kind].prefix)
    rng = np.random.default_rng(0)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[kind].name)
    writer.add_name(f"synthetic {kind}")
    mostly = f"MOSTLY_{ARCHITECTURES[kind].mostly or matrices.name}"
    writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if matrices == FLOAT32 else mostly]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    describe(writer, config)
    all_tensors = list(tensors(config, matrices))
    numbered = enumerate(all_tensors, start=1)
    last_of_layer = {t.name.split(".")[1]: number for number, t in numbered if t.name.startswith("blk.")}
    for tensor in all_tensors:
        raw = None if tensor.type == FLOAT32 else tensor.type
        writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.stored_dtype, tensor.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for number, tensor in enumerate(all_tensors, start=1):
            made = make_random(tensor, rng) if random else make(tensor, source.read, pool)
            writer.write_tensor_data(made)
            seconds = time.monotonic() - started
            if number in last_of_layer.values():
                done = f"{number} of {len(all_tensors)} tensors"
                print(f"{out.name}: {done}, {seconds:.0f} s", file=sys.stderr)
    writer.close()
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as GGUF.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--type", default="Q4_0", choices=["Q4_0", "Q8_0", "F32"])
    parser.add_argument("--random", action="store_true", help="make weights, read only the shapes")
    options = parser.parse_args()
    kind = gguf.GGMLQuantizationType[options.type]
    write(options.checkpoint, options.out, kind, random=options.random)


if __name__ == "__main__":
    main()
