"""Make the environment that the llama.cpp peer runs in: llama-cpp-python and gguf from PyPI.

llama.cpp is compiled for this processor (GGML_NATIVE, OpenMP) or for any with AVX2, and also for the GPU if
there are one and nvcc. That takes some minutes and needs a C++ compiler. Nothing is installed in moe-local's
own environment.

    python benchmarks/peers/install.py [--isa avx2] [FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from packaging.version import Version

from moe_local.offload.system.home import moe_local_home

REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
CMAKE_ARGS = "-DGGML_OPENMP=ON -DMTMD_BUILD=OFF"
AVX2 = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
PROCESSORS = {
    "native": "-DGGML_NATIVE=ON",
    "avx2": " ".join(["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in AVX2)]),
}
"""For which processor llama.cpp is compiled: this one, or any with AVX2."""

CUDA_ARGS = "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native"
COMPLETE = "moe-local-peer.json"
"""Written last, so that an interrupted installation is not taken for a finished one."""


def default_folder(isa: str = "native") -> Path:
    """For a key of PROCESSORS."""
    return moe_local_home() / "benchmarks" / ("llama.cpp" if isa == "native" else f"llama.cpp-{isa}")


def interpreter(folder: Path, isa: str = "native") -> Path | None:
    """The Python of the environment in `folder`; None unless it is complete and has these requirements."""
    try:
        installed = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return _python(folder) if installed == _contents(isa) else None


def install(folder: Path, isa: str = "native") -> Path:
    """The Python of the environment in `folder`, which is made first if need be. Raises SystemExit if pip
    fails, whose output is shown."""
    if python := interpreter(folder, isa):
        return python
    print(f"installing {' '.join(REQUIREMENTS)} into {folder}; compiling takes minutes", file=sys.stderr)
    (folder / COMPLETE).unlink(missing_ok=True)
    pip = [*_pip(folder), "install", "--quiet"]
    # Without pip's cache, which does not know for which options and processor a wheel was compiled.
    # And again if it is there already: then it was compiled for something else.
    fresh = ["--no-binary", "llama-cpp-python", "--no-cache-dir", "--force-reinstall"]
    env = {**os.environ, "CMAKE_ARGS": cmake_args(isa)}
    done = subprocess.run([*pip, *fresh, *REQUIREMENTS], env=env, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pip could not install {' '.join(REQUIREMENTS)} into {folder}; see its words above")
    (folder / COMPLETE).write_text(json.dumps(_contents(isa)))
    return _python(folder)


def _pip(folder: Path) -> list[str]:
    """Make the environment in `folder`; returns a command for pip there: our own pip if it supports
    --python, since the Python of some systems comes without one."""
    able = importlib.util.find_spec("pip") and Version(importlib.metadata.version("pip")) >= Version("22.3")
    venv.create(folder, with_pip=not able)
    python = str(_python(folder))
    return [sys.executable, "-m", "pip", "--python", python] if able else [python, "-m", "pip"]


def cmake_args(isa: str) -> str:
    gpu = shutil.which("nvcc") and shutil.which("nvidia-smi")
    return " ".join([PROCESSORS[isa], CMAKE_ARGS, *([CUDA_ARGS] if gpu else [])])


def _contents(isa: str) -> dict[str, object]:
    return {"requirements": list(REQUIREMENTS), "cmake": cmake_args(isa)}


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install llama.cpp as a peer for benchmarks/decode.py.")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    parser.add_argument("--isa", choices=PROCESSORS, default="native", help="what it is compiled for")
    options = parser.parse_args()
    print(install(options.folder or default_folder(options.isa), options.isa))


if __name__ == "__main__":
    main()
