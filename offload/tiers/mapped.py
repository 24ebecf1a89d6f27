"""Whether kernels of a GPU can read host memory directly."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from moe_local.offload.tiers.device import HostMemory


def is_mapped(memory: HostMemory) -> bool:
    """Whether kernels of the current CUDA device can read all of the memory at the host's addresses.

    Registered memory is mapped where host and device share one address space, as on all 64-bit systems;
    whether at the same address depends on the system. False if CUDA's driver cannot be asked.
    """
    driver = _driver()
    if driver is None or memory.pinned_bytes < memory.nbytes or not memory.registered:
        return False
    for address in memory.registered:
        seen = ctypes.c_uint64()
        if driver.cuMemHostGetDevicePointer_v2(ctypes.byref(seen), ctypes.c_void_p(address), 0) != 0:
            return False
        if seen.value != address:
            return False
    return True


@cache
def _driver() -> Any:
    """CUDA's driver library, which is installed wherever there is a device; None without it."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
