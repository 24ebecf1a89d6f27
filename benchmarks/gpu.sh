#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes with nothing to download; leaves one JSON.
#
#   bash benchmarks/gpu.sh [OUT.json] [--limit SECONDS] [--only PART...] [--again]
#   ROUTES=folder-with-recorded-routes LAYERS=32 bash benchmarks/gpu.sh     default: benchmarks/results/gpu.json
#
# Runs the gpu tests; holds kernels and attention against the memory's speed; and measures decoding, by `moe-local
# bench`, with made weights at the true widths and VRAM capped at 24 GiB, to stand for a consumer card: Mixtral 8x7B at
# the link's own speed, with copies held to 25 GB/s and without CUDA graphs; Qwen3-30B-A3B resident and at half its
# experts, its misses brought by the device and by the host, where ROUTES is given by recorded routes too; twelve layers
# of Qwen3.6-35B-A3B, which keep states; and prefill. What no time was left for, or failed, is run by the next call
# (gpu_parts.py), which needs MOE_LOCAL_HOME set to find the weights that the first one made. Peers are another command,
# gpu_peers.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export MOE_LOCAL_HOME="${MOE_LOCAL_HOME:-$work/home}" PYTHONUNBUFFERED=1
python benchmarks/gpu_parts.py "$@" --layers "${LAYERS:-32}" ${ROUTES:+--routes "$ROUTES"}
