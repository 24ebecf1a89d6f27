"""Building the package: the library is compiled into it where there is a compiler, not missed elsewhere."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="made for Unix compilers"),
]

FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("src", "cache", "offload", "cli", "demo")


@pytest.fixture(autouse=True)
def setuptools_here() -> None:
    """What pyproject.toml builds with must be installed: these tests fetch nothing."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or later")


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """The package's sources without anything that was ever built, where they can be found in a binary."""
    place = tmp_path / "the-place-it-was-built-in"
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(repository / name, place / name, ignore=built)
    for name in FILES:
        shutil.copy(repository / name, place)
    return place


@pytest.fixture
def quick(compiler: str, tmp_path: Path) -> dict[str, str]:
    """For the environment: the compiler without optimization, where it matters only that it is called."""
    script = tmp_path / "quick-compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script)}


def run(folder: Path, *arguments: str | Path, **environment: str) -> str:
    """`python ...` in a folder; returns what was printed, fails with it."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that is built from the sources in `folder`."""
    out = folder.parent / "wheels"
    call = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    run(folder, *call, **environment)
    (built,) = out.glob("moe_local-*.whl")
    python, abi, platform = built.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")  # one for every Python
    assert platform.endswith(sysconfig.get_platform().rpartition("-")[2].replace("-", "_"))
    return zipfile.ZipFile(built)


LIBRARY = "moe_local/offload/native/_native.so"


def test_a_wheel_has_the_library_and_no_trace_of_where_it_was_built(
    compiler: str, checkout: Path, tmp_path: Path
) -> None:
    built = wheel(checkout)
    names = built.namelist()
    assert names.count(LIBRARY) == 1
    assert {"moe_local/__init__.py", "moe_local/offload/native/library.py"} <= set(names)
    file = Path(built.extract(LIBRARY, tmp_path / "installed"))
    assert checkout.name.encode() not in file.read_bytes()
    lib = ctypes.CDLL(str(file))
    assert lib.moe_best_isa() >= 0
    assert lib.moe_set_isa(0) == 0


def test_without_a_compiler_a_wheel_has_all_else(checkout: Path) -> None:
    built = wheel(checkout, CC="/bin/false", CXX="/bin/false")
    names = set(built.namelist())
    assert not {name for name in names if name.endswith((".so", ".o"))}
    modules = {f"moe_local/{path.relative_to(checkout)}" for path in checkout.glob("offload/**/*.py")}
    assert modules <= names


def test_a_source_distribution_has_what_compiling_needs(
    quick: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    run(checkout, "setup.py", "-q", "sdist", "-d", tmp_path / "sdist")
    (packed,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert LIBRARY in wheel(folder, **quick).namelist()


def test_in_place_it_lies_beside_its_python(quick: dict[str, str], checkout: Path) -> None:
    run(checkout, "setup.py", "-q", "build_ext", "--inplace", **quick)
    assert (checkout / "offload" / "native" / "_native.so").is_file()
    assert not list((checkout / "src").rglob("*.so"))


def test_a_users_project_passes_mypy_strict(checkout: Path, repository: Path, tmp_path: Path) -> None:
    """The examples, in an environment that the wheel is installed in, beside all that is installed here."""
    pytest.importorskip("mypy")
    built = wheel(checkout, CC="/bin/false", CXX="/bin/false")
    environment, project = tmp_path / "environment", tmp_path / "project"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    built.extractall(site)
    (site / "others.pth").write_text("\n".join(folder for folder in sys.path if folder.endswith("-packages")))
    shutil.copytree(repository / "examples", project)
    scripts = sorted(path.name for path in project.glob("*.py"))
    check = ("-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", tmp_path / "mypy")
    assert f"no issues found in {len(scripts)} source files" in run(project, *check, *scripts)
    (project / "wrong.py").write_text("import moe_local\n\nmoe_local.load(3, slots='many')\n")
    with pytest.raises(AssertionError, match="incompatible type"):
        run(project, *check, "wrong.py")
