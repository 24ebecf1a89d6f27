#!/usr/bin/env bash
# Everything that needs a GPU, in calls of under nine minutes with nothing to download: the first measures what has a
# target, two more with the same OUT the rest. Leaves one JSON.
#
#   bash benchmarks/gpu.sh [OUT.json] [--limit SECONDS] [--only PART...] [--again]
#   ROUTES=folder-with-recorded-routes LAYERS=32 bash benchmarks/gpu.sh     default: benchmarks/results/gpu.json
#
# Holds kernels against the memory's speed, and measures decoding with made weights at the true widths and VRAM capped at
# 24 GiB, to stand for a consumer card: Mixtral 8x7B with the demo's routes and with random ones, at the link's own speed
# and with copies held to 25 GB/s, with and without CUDA graphs; Qwen3-30B-A3B resident, beside plain execution of the
# same kernels, and at half its experts, its misses brought by the device and by the host, where ROUTES is given by
# recorded routes too; twelve layers of Qwen3.6-35B-A3B, which keep states; prefill; and the gpu tests. It says first how
# long that will probably take. What no time is left for, or failed, is run by the next call with the same OUT
# (gpu_parts.py). Weights are 50 GB, in memory (/dev/shm) where that has the room, and made again unless MOE_LOCAL_HOME is
# set. Peers are another command, gpu_peers.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/gpu_home.sh
"$python" benchmarks/gpu_parts.py "$@" --layers "${LAYERS:-32}" ${ROUTES:+--routes "$ROUTES"}
