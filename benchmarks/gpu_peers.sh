#!/usr/bin/env bash
# moe-local beside others on one GPU, the same shapes and the same VRAM: transformers with accelerate's offloading, and
# llama.cpp's CUDA build at several --n-cpu-moe. Leaves one JSON for each peer.
#
#   bash benchmarks/gpu_peers.sh [OUT_FOLDER]  default: benchmarks/results
#
# LAYERS (8) of Mixtral 8x7B with made weights; VRAM is 24 GiB in the proportion of the layers. llama.cpp is compiled on
# first use (peers/install.py), which needs nvcc, minutes, and PyPI or PIP_FIND_LINKS.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
layers="${LAYERS:-8}"
vram="$((24 * 1024 * layers / 32))MiB"
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export MOE_LOCAL_HOME="${MOE_LOCAL_HOME:-$work/home}"
python benchmarks/synthetic.py "$work/mixtral" --layers "$layers" --seed 0
decode() { python benchmarks/decode.py "$work/mixtral" --vram "$vram" --dense nf4 --activations native "$@"; }
decode --peer transformers --tokens 8 --rounds 5 --prefetch auto --json "$out/gpu-transformers.json"
# The cap does not bind llama.cpp: of 8 layers, one on the CPU is the least that keeps it to 6 GiB.
decode --peer llama.cpp --n-cpu-moe 1 2 3 --tokens 48 --rounds 7 --prefetch auto --json "$out/gpu-llama_cpp.json"
