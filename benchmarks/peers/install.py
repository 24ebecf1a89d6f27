"""Make the environment that the llama.cpp peer runs in: llama-cpp-python and gguf from PyPI.

llama.cpp is compiled for this processor (GGML_NATIVE, OpenMP), and also for the GPU if there are one and
nvcc. That takes some minutes and needs a C++ compiler. Nothing is installed in moe-local's own environment.

    python benchmarks/peers/install.py [FOLDER]
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
CMAKE_ARGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DMTMD_BUILD=OFF"
CUDA_ARGS = "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native"
COMPLETE = "moe-local-peer.json"
"""Written last, so that an interrupted installation is not taken for a finished one."""


def default_folder() -> Path:
    return moe_local_home() / "benchmarks" / "llama.cpp"


def interpreter(folder: Path) -> Path | None:
    """The Python of the environment in `folder`; None unless it is complete and has these requirements."""
    try:
        installed = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return _python(folder) if installed == _contents() else None


def install(folder: Path) -> Path:
    """The Python of the environment in `folder`, which is made first if need be. Raises SystemExit if pip
    fails, whose output is shown."""
    if python := interpreter(folder):
        return python
    print(f"installing {' '.join(REQUIREMENTS)} into {folder}; compiling takes minutes", file=sys.stderr)
    pip = [*_pip(folder), "install", "--quiet"]
    # Without pip's cache, which does not know for which options and processor a wheel was compiled.
    fresh = ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
    env = {**os.environ, "CMAKE_ARGS": cmake_args()}
    done = subprocess.run([*pip, *fresh, *REQUIREMENTS], env=env, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pip could not install {' '.join(REQUIREMENTS)} into {folder}; see its words above")
    (folder / COMPLETE).write_text(json.dumps(_contents()))
    return _python(folder)


def _pip(folder: Path) -> list[str]:
    """Make the environment in `folder`; returns a command for pip there: our own pip if it supports
    --python, since the Python of some systems comes without one."""
    able = importlib.util.find_spec("pip") and Version(importlib.metadata.version("pip")) >= Version("22.3")
    venv.create(folder, with_pip=not able)
    python = str(_python(folder))
    return [sys.executable, "-m", "pip", "--python", python] if able else [python, "-m", "pip"]


def cmake_args() -> str:
    gpu = shutil.which("nvcc") and shutil.which("nvidia-smi")
    return f"{CMAKE_ARGS} {CUDA_ARGS}" if gpu else CMAKE_ARGS


def _contents() -> dict[str, object]:
    return {"requirements": list(REQUIREMENTS), "cmake": cmake_args()}


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install llama.cpp as a peer for benchmarks/decode.py.")
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder(), metavar="FOLDER")
    print(install(parser.parse_args().folder))


if __name__ == "__main__":
    main()
