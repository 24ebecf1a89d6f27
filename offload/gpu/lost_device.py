"""Error messages for a GPU that fails while a model is loaded; nothing on it can be saved."""

from __future__ import annotations

import re
from typing import NoReturn

from moe_local.cache.errors import MoeLocalError, first_line
from moe_local.offload.kernels.launcher import VARIABLE as TRITON

_LOST = re.compile(
    r"illegal memory access|misaligned address|illegal instruction|unspecified launch failure|"
    r"launch timed out|device-side assert|invalid program counter|hardware stack|ECC error"
)
"""CUDA's errors after which a process cannot use the device any more."""


def raise_as_one_line(error: RuntimeError) -> NoReturn:
    """Raise MoeLocalError, with a remedy, for an error of CUDA; re-raise any other error.

    moe-local's own kernels are the first suspects on a new machine. Which kernel failed is unknown, since
    CUDA reports it at some later call.
    """
    text = first_line(error)
    if "CUDA" not in text and "HIP" not in text:
        raise error
    if _LOST.search(text) is None:
        remedy = "end what else uses the GPU, and ask moe-local doctor"
    else:
        remedy = (
            f"try again in a new process with MOE_LOCAL_DEVICE_MISSES=off, then with {TRITON}=off, then with "
            "MOE_LOCAL_GRAPHS=off, and tell moe-local's makers which one helped"
        )
    raise MoeLocalError(f"the GPU failed while the model was loaded: {text.rstrip('.')}; {remedy}") from error
