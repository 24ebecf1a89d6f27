#!/usr/bin/env bash
# Everything that needs a GPU, in one command with nothing to download; leaves one JSON. The time-outs of all parts add
# up to 26 minutes; where a GPU is lent for less at a time, the pieces below are meant to take under nine each.
#
#   [PARTS=tests|mixtral|qwen3] bash benchmarks/gpu.sh [OUT.json]     default: benchmarks/results/gpu.json
#
# A piece goes into the file beside what others left there.
# Runs the gpu tests; holds the kernels against the memory's speed; and measures decoding, by `moe-local bench`, with
# made weights at the true widths and VRAM capped at 24 GiB, to stand for a consumer card: Mixtral 8x7B at the link's
# own speed, with copies held to 25 GB/s and without CUDA graphs; Qwen3-30B-A3B resident and at half its experts, where
# ROUTES (a folder with recorded routes) is given by those. Every part has a time-out and a failing part does not stop
# the others: its entry says so. Peers are another command, gpu_peers.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results/gpu.json}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export MOE_LOCAL_HOME="${MOE_LOCAL_HOME:-$work/home}" PYTHONUNBUFFERED=1
layers="${LAYERS:-32}"
routes="${ROUTES:-}"
mkdir -p "$work/parts"

part() { # part NAME SECONDS COMMAND...: its JSON document, the last line of its output, is kept by its name
  local name="$1" seconds="$2" began=$SECONDS
  shift 2
  echo "== $name (at ${SECONDS} s)" >&2
  if timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$work/out" 2>"$work/err"; then status=0; else status=$?; fi
  tail -n 12 "$work/err" >&2
  python - "$work" "$name" "$status" "$((SECONDS - began))" <<'PY'
import json, pathlib, sys
work, name, status, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
text = (work / "out").read_text().strip()
try:
    result = json.loads(text)
except ValueError:
    try:
        result = json.loads(text.rpartition("\n")[2])
    except ValueError:
        result = {"output": text.splitlines()[-20:]}
entry = {"status": status, "seconds": seconds, "result": result}
if status:
    entry["errors"] = (work / "err").read_text().splitlines()[-20:]
(work / "parts" / f"{name}.json").write_text(json.dumps(entry))
PY
}

bench() { python -m moe_local.cli bench --json --context 4096 "$@"; }
mixtral() { bench --synthetic mixtral-8x7b --layers "$layers" --vram 24GiB "$@"; }
qwen() { bench --synthetic qwen3-30b-a3b --vram 24GiB --workload single "$@"; }
export -f bench mixtral qwen
export layers

which="${PARTS:-all}"
case "$which" in
all | tests | mixtral | qwen3) ;;
*)
  echo "PARTS=$which is no piece; give tests, mixtral or qwen3" >&2
  exit 2
  ;;
esac
if [[ $which == all || $which == tests ]]; then
  part tests 400 python -m pytest -q -o addopts=--import-mode=importlib -m gpu tests/gpu -p no:cacheprovider
  part kernels 60 python benchmarks/gpu_kernels.py
  part encode 30 python benchmarks/encode.py --dtypes bf16 --rounds 6
fi
if [[ $which == all || $which == mixtral ]]; then
  part mixtral 240 bash -c 'mixtral --workload single,long --tokens 32 --repeats 3 --compare'
  part mixtral_25GBs 120 env MOE_LOCAL_LINK_LIMIT=25GB bash -c 'mixtral --workload single --tokens 32 --repeats 6'
  part mixtral_no_graphs 100 env MOE_LOCAL_GRAPHS=off bash -c 'mixtral --workload single --tokens 32 --repeats 3'
fi
if [[ $which == all || $which == qwen3 ]]; then
  part qwen3_resident 100 bash -c 'qwen --tokens 64 --repeats 4'
  part qwen3_resident_no_graphs 80 env MOE_LOCAL_GRAPHS=off bash -c 'qwen --tokens 64 --repeats 3'
  part device_misses 60 python benchmarks/device_misses.py
  part qwen3_half 120 env MOE_LOCAL_DEVICE_MISSES=on bash -c 'qwen --slots 64 --tokens 48 --repeats 3 --compare'
  part qwen3_half_by_host 60 env MOE_LOCAL_DEVICE_MISSES=off bash -c 'qwen --slots 64 --tokens 48 --repeats 3'
  if [ -n "$routes" ]; then
    part qwen3_half_recorded 80 env MOE_LOCAL_DEVICE_MISSES=off bash -c "qwen --slots 64 --tokens 48 --repeats 4 --routes $routes/qwen3-30b-a3b_top6.csv"
  fi
  part prefill 100 bash -c 'python benchmarks/synthetic.py "$1" --layers 2 --seed 0 >/dev/null &&
    python benchmarks/prefill.py "$1" --vram 24GiB --slots 2 4 --prompt-tokens 512 2048 --rounds 6' - "$work/mixtral"
fi

python - "$work/parts" "$out" "$SECONDS" "$which" <<'PY'
import json, pathlib, sys
from moe_local.cache.files import write_atomically
parts, out, seconds, which = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
if which != "all" and out.exists():
    found = json.loads(out.read_text())["parts"] | found
out.parent.mkdir(parents=True, exist_ok=True)
write_atomically(out, [json.dumps({"benchmark": "gpu", "seconds": seconds, "parts": found}, indent=1), "\n"])
for name, entry in found.items():
    print(f"{name:26} status {entry['status']:3}  {entry['seconds']:4} s")
print(out)
PY
