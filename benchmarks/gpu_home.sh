# For gpu.sh and gpu_peers.sh: a place for weights that is gone at the end, if MOE_LOCAL_HOME names none that stays.
# Disks may take minutes to write 50 GB; memory takes seconds, where there are as many again for what is measured.
python="$(command -v python3 || command -v python)"
if [ -z "${MOE_LOCAL_HOME:-}" ]; then
  in_memory="$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print int($4 / 1024 / 1024)}' || true)"
  free="$(awk '/^MemAvailable/ {print int($2 / 1024 / 1024)}' /proc/meminfo 2>/dev/null || true)"
  base="${TMPDIR:-/tmp}"
  if [ "${in_memory:-0}" -ge 56 ] && [ "${free:-0}" -ge 110 ]; then base=/dev/shm; fi
  work="$(mktemp -d "$base/moe-local-XXXXXX")"
  trap 'rm -rf "$work"' EXIT
  trap 'exit 130' INT TERM
  export MOE_LOCAL_HOME="$work/home"
fi
# Kernels are measured without a loaded model, too, which would leave cuDNN out (leave_cudnn_out in offload/dense/attention.py).
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_CUDNN_SDPA_DEPRIORITIZED=1
