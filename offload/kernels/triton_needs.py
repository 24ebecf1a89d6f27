"""What Triton needs to compile a kernel, and what to do if something is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

C_COMPILERS = ("gcc", "clang")
"""The compilers that Triton looks for."""


def remedy(error: Exception | None = None) -> str:
    """What most likely makes Triton run after it failed with this error.

    Besides ptxas, which is part of it, Triton calls a C compiler and needs Python's headers, to compile the
    code that launches its kernels. Slim images have neither, and distributions have the headers in a separate
    package. It asks ldconfig where CUDA's driver is, which fails in containers and on some distributions, and
    it writes files to a cache folder.
    """
    if error is not None and any(word in str(error) for word in ("ldconfig", "libcuda")):
        return "set TRITON_LIBCUDA_PATH to the folder that libcuda.so.1 is in"
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return "set TRITON_CACHE_DIR to a folder that can be written and has room"
    if importlib.util.find_spec("triton") is None:
        return "pip install triton-windows" if sys.platform == "win32" else "pip install triton"
    if sys.platform == "win32":  # triton-windows includes a compiler
        return "pip install --upgrade triton-windows"
    named = os.environ.get("CC")
    if named and shutil.which(named) is None:
        return f"set CC to a C compiler, or unset it: there is no {named}, with which Triton compiles"
    if not named and not any(map(shutil.which, C_COMPILERS)):
        return "install a C compiler (gcc), which Triton compiles with"
    if not headers().exists():
        return (
            f"install Python's headers ({headers()} is missing; on Debian and Ubuntu, python3-dev), "
            "which Triton compiles with"
        )
    return "pip install --force-reinstall torch, which brings the Triton that goes with it"


def headers() -> Path:
    """Where Triton looks for Python's header."""
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's scheme, but the headers are in the standard place
        scheme = "posix_prefix"
    return Path(sysconfig.get_path("include", scheme)) / "Python.h"
