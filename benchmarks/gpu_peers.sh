#!/usr/bin/env bash
# moe-local beside others on one GPU, the same shapes and the same VRAM: transformers with accelerate's offloading, and
# llama.cpp's CUDA build at several --n-cpu-moe. Leaves one JSON, as gpu.sh does, and takes its flags.
#
#   LAYERS=8 bash benchmarks/gpu_peers.sh [OUT.json]       default: benchmarks/results/gpu_peers.json
#
# LAYERS of Mixtral 8x7B with made weights; VRAM is 24 GiB in the proportion of the layers. llama.cpp is compiled on
# first use (peers/install.py), which needs nvcc, minutes, and PyPI or PIP_FIND_LINKS.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/gpu_home.sh
"$python" benchmarks/gpu_parts.py "$@" --peers --layers "${LAYERS:-8}"
