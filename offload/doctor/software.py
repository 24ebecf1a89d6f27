"""Checks of Python, packages, the compiler and kernels."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata

import torch
from packaging.requirements import InvalidRequirement, Requirement

from moe_local.offload.doctor.finding import Finding, fail, warn
from moe_local.offload.native.library import ISAS, library

COMPILERS = ("c++", "g++", "clang++", "cl")
X86 = ("x86_64", "amd64")


def software() -> Iterator[Finding]:
    """Python and the packages that are installed in it."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    try:
        needed = metadata.requires("moe-local") or []
        yield Finding("moe-local", metadata.version("moe-local"))
    except metadata.PackageNotFoundError:
        yield warn("moe-local", "is imported from a folder, not installed", "pip install . in that folder")
        needed = []
    cuda = torch.version.cuda or torch.version.hip
    yield Finding(
        "torch",
        f"{torch.__version__}, {f'for CUDA {cuda}' if cuda else 'for CPUs'}",
        facts={"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
    )
    yield packages(needed)


def packages(requirements: Iterable[str]) -> Finding:
    """Whether all required packages are installed, in versions that the requirements allow."""
    missing, others, wanted, count = [], [], [], 0
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            others.append(f"{requirement.name} {version} (needs {requirement.specifier})")
            wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if missing:
        return fail("packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if others:
        return warn("packages", ", ".join(others), f"pip install {' '.join(wanted)}")
    return Finding("packages", f"all {count} that moe-local needs")


def kernels(devices: Iterable[torch.device]) -> Iterator[Finding]:
    """Which kernels compute experts on this machine, and which compiler there is to build them."""
    lib = library()
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    compiler = os.environ.get("CXX") or found
    if lib is None:
        remedy = "install moe-local again as before, with pip's --force-reinstall --no-deps"
        if compiler is None:
            remedy = f"install a C++17 compiler (g++ or clang++), then {remedy}"
        yield warn("CPU kernels", "PyTorch: tens of times slower than the C++ ones", remedy, isa=None)
    else:
        isa = ISAS[lib.moe_isa()]
        if isa == ISAS[0] and platform.machine().lower() in X86:
            yield warn(
                "CPU kernels",
                "C++ without AVX2: several times slower than with it",
                "use a processor with AVX2, or let the virtual machine pass the processor's features on",
                isa=isa,
            )
        else:
            yield Finding("CPU kernels", f"C++, {isa}", facts={"isa": isa})
    if compiler is not None or lib is not None:
        yield Finding("compiler", compiler or "none, and none is needed: the C++ kernels are there")
    else:
        yield warn("compiler", "none", "install g++ or clang++")
    for device in devices:
        yield gpu_kernels(device)


def gpu_kernels(device: torch.device) -> Finding:
    """Which kernels a CUDA device computes experts with; compiles a tiny one."""
    from moe_local.offload.kernels.launcher import triton_kernels
    from moe_local.offload.kernels.triton_needs import remedy

    name = f"kernels of {device}"
    if triton_kernels(device) is not None:
        return Finding(name, "Triton, all experts of a layer at once", facts={"triton": True})
    return warn(name, "bitsandbytes, one expert after the other: Triton does not run", remedy(), triton=False)
