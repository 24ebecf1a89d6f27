#!/usr/bin/env bash
# prefill.py on a GPU, over two layers at Mixtral 8x7B's widths that are written first; a part of gpu.sh.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
here="$(dirname "$0")"
python "$here/synthetic.py" "$work/mixtral" --layers 2 --seed 0 >/dev/null
python "$here/prefill.py" "$work/mixtral" --vram 24GiB --slots 2 4 --prompt-tokens 512 2048 --rounds 6
