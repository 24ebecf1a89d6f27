"""Compiles the C++ library of offload/native, where there is a compiler; pyproject.toml holds all else."""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "offload/native/src"
UNITS = [
    # the interface:
    *("linear", "experts", "attention", "latent", "prompt", "layers"),
    *("convolution", "delta", "delta_net", "scan", "mamba2"),
    *("mlp", "route", "norm", "encode", "read"),
    *("work", "threads", "cpu", "isa_portable", "isa_avx2", "isa_avx512_vnni", "isa_avx512"),
]


class BuildLibrary(build_ext):
    """Builds a plain shared library with a C interface: it includes no Python and links to none."""

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # not a module: there is no PyInit function


class BuildWheel(bdist_wheel):
    """One wheel a platform: the library is no Python's in particular."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The instruction sets' units ask for their own instructions in the source, so one set of flags serves all.
# Nothing is contracted or reordered behind the source's back: the encoder is bit-equal to bitsandbytes'. What
# Python's own flags add for debuggers, the builder's folders among it, is left out.
flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
flags += ["-Wall", "-Wextra"]
library = Extension(
    "moe_local.offload.native._native",
    sources=[f"{SOURCES}/{unit}.cpp" for unit in UNITS],
    depends=["setup.py", *glob(f"{SOURCES}/*.h")],
    extra_compile_args=["/std:c++17", "/O2", "/EHsc"] if sys.platform == "win32" else flags,
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    language="c++",
    optional=True,
)

setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel})
