"""Measuring for a processor with fewer instructions than this one has."""

from __future__ import annotations

import os

from moe_local.offload.native.library import ISAS, loaded_library

FOR_TORCH = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""By instruction set, the environment in which torch and the libraries in it use no other either; they look
when torch is imported."""


def use(isa: str) -> None:
    """Make the library use an instruction set, which this processor must support."""
    assert loaded_library().moe_set_isa(ISAS.index(isa)) == 0


def missing(isa: str) -> str:
    """What to set in the environment so that torch uses no more than this; empty if it is."""
    wanted = FOR_TORCH[isa].items()
    return " ".join(f"{name}={value}" for name, value in wanted if os.environ.get(name) != value)
