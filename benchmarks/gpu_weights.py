"""Make the weights that the parts of gpu.sh measure with, all at once, and record the demo's routes.

They are written once, below MOE_LOCAL_HOME: 26 GB for Mixtral 8x7B, 17 GB for Qwen3-30B-A3B. The routes are
those of the demo, a small trained model with as many experts per layer as Mixtral: the routers of made
weights are not trained, and with these routes their experts are chosen as in a trained model.

Run: python benchmarks/gpu_weights.py mixtral-8x7b:32 qwen3-30b-a3b:48 [--routes FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from moe_local.offload.measure import synthetic
from moe_local.offload.system.home import moe_local_home

TOKENS = 64
"""Tokens of each answer whose routes are recorded."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.routes = options.routes and options.routes.resolve()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        making = [pool.submit(make, *model) for model in options.models]
        if options.routes is not None and not options.routes.exists():
            record(options.routes)
        made = [each.result() for each in making]
    print(json.dumps({"benchmark": "gpu_weights", "home": str(moe_local_home()), "models": made}))


def make(name: str, layers: int) -> dict[str, object]:
    began = time.perf_counter()
    model = synthetic.describe(name, layers)
    synthetic.make(model)
    nbytes = model.experts_nbytes + model.dense_nbytes
    return {"name": name, "layers": layers, "bytes": nbytes, "seconds": time.perf_counter() - began}


def record(routes: Path) -> None:
    """Record the demo's routes while it answers the four questions of a conversation, on the CPU."""
    routes.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "moe_local", "bench", "demo", "--device", "cpu", "--json"]
    command += ["--workload", "chat", "--tokens", str(TOKENS), "--repeats", "1"]
    command += ["--record-routes", str(routes)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def model_of(text: str) -> tuple[str, int]:
    name, _, layers = text.rpartition(":")
    return name, int(layers)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=model_of, metavar="NAME:LAYERS")
    parser.add_argument("--routes", type=Path, metavar="FILE", help="where the demo's routes go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
