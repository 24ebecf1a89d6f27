#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes; leaves one JSON in benchmarks/results/.
#
#   bash benchmarks/gpu.sh [OUT_FOLDER]
#
# Writes a full-width synthetic Mixtral of 2 layers to a temporary folder (no download), runs the gpu tests, holds
# the kernels against the memory's speed, and measures decoding with VRAM capped at 24 GiB, to stand for a
# consumer card.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export MOE_LOCAL_HOME="$work/home"

python -m pytest -q -o addopts="--import-mode=importlib" -m gpu tests/gpu -p no:cacheprovider || echo "gpu tests FAILED" | tee "$out/gpu-tests-failed"

python benchmarks/gpu_kernels.py --json "$out/gpu-kernels.json" || echo "gpu_kernels.py FAILED"
python benchmarks/encode.py --dtypes bf16 --rounds 6 --json "$out/gpu-encode.json"
python benchmarks/synthetic.py "$work/mixtral" --layers 2 --seed 0
python benchmarks/decode.py "$work/mixtral" --vram 24GiB --slots 2 4 8 --prefetch off router --miss fetch \
    --tokens 48 --rounds 5 --json "$out/gpu-decode.json"
python benchmarks/decode.py "$work/mixtral" --vram 24GiB --slots 4 --prefetch off --miss fetch cpu auto \
    --tokens 48 --rounds 5 --json "$out/gpu-miss.json"
# The same decoding as above without CUDA graphs; 8 slots are all experts, so there a token is one graph.
MOE_LOCAL_GRAPHS=off python benchmarks/decode.py "$work/mixtral" --vram 24GiB --slots 4 8 --prefetch off --miss fetch \
    --tokens 48 --rounds 3 --json "$out/gpu-no-graphs.json"
