"""The library under sanitizers of addresses, undefined behaviour and threads; and what its units share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS = ("-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w")


def call(*command: str | Path, **environment: str) -> str:
    """Runs to the end and returns what was printed; fails with all of it."""
    ended = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def run(program: Path, *arguments: str, **environment: str) -> str:
    """As `call`, and where that can be had with all memory in its usual places: sanitizers keep what they
    know at addresses of their own, and some kernels give those away, by chance."""
    fixed = ("setarch", "-R")
    can = shutil.which(fixed[0]) and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return call(*(fixed if can else ()), program, *arguments, **environment)


def build(compiler: str, sources: Path, to: Path, *sanitizers: str) -> Path:
    """tests/native/driver.cpp and the library in one program."""
    probe = to.with_suffix(".cpp")
    probe.write_text("int main() { return 0; }\n")
    works = subprocess.run([compiler, *sanitizers, probe, "-o", to], capture_output=True)
    if works.returncode != 0 or subprocess.run([to], capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no {sanitizers[0]} here")
    driver = Path(__file__).parent / "driver.cpp"
    units = sorted(sources.glob("*.cpp"))
    call(compiler, *FLAGS, "-O1", "-g", *sanitizers, f"-I{sources}", *units, driver, "-o", to)
    return to


@pytest.fixture(scope="module")
def optimized(
    compiler: str, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """A unit's object file, compiled as in the package; once for all that look into it."""
    folder = tmp_path_factory.mktemp("optimized")

    def object_of(unit: Path) -> Path:
        compiled = folder / f"{unit.stem}.o"
        if not compiled.exists():
            call(compiler, *FLAGS, "-O3", "-c", unit, "-o", compiled)
        return compiled

    return object_of


@pytest.mark.parametrize("callers", [1, 3])
def test_no_address_and_no_undefined_behaviour(
    compiler: str, sources: Path, tmp_path_factory: pytest.TempPathFactory, callers: int
) -> None:
    program = tmp_path_factory.getbasetemp() / "driver_address"
    if not program.exists():
        watched = "-fsanitize=address,undefined,float-cast-overflow"
        build(compiler, sources, program, watched, "-fno-sanitize-recover=all")
    for seed in range(3):
        said = run(program, str(seed), "40", str(callers), UBSAN_OPTIONS="print_stacktrace=1")
        assert "instruction set 0: done" in said


def test_no_data_race(compiler: str, sources: Path, tmp_path: Path) -> None:
    program = build(compiler, sources, tmp_path / "driver_thread", "-fsanitize=thread")
    for seed in range(2):
        assert "instruction set 0: done" in run(program, str(seed), "20", "4")


@pytest.mark.parametrize("level", ["-O0", "-O3"])
def test_no_unit_can_be_linked_with_wider_instructions_than_its_own(
    compiler: str, sources: Path, optimized: Callable[[Path], Path], tmp_path: Path, level: str
) -> None:
    """A function that two units define is taken from either; what has AVX must define none of those.

    Nor may anything but its table be reached without asking what the processor has.
    """
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    for path in sorted(sources.glob("isa_*.cpp")):
        unit, compiled = path.stem, tmp_path / f"{path.stem}.o"
        if level == "-O3":
            compiled = optimized(path)
        else:
            call(compiler, *FLAGS, level, "-c", path, "-o", compiled)
        symbols = re.findall(r"^\S* +([A-Zu]) (\S+)$", call("nm", "-C", "--defined-only", compiled), re.M)
        defined = {name.removesuffix("()") for _, name in symbols if not name.startswith("DW.ref.")}
        assert defined == {f"{unit.removeprefix('isa_')}_kernels"}, (unit, symbols)


def test_no_instruction_of_a_wider_set_outside_of_its_unit(
    sources: Path, optimized: Callable[[Path], Path]
) -> None:
    if shutil.which("objdump") is None or os.uname().machine != "x86_64":
        pytest.skip("no objdump for this")
    ymm, zmm = {"xmm", "ymm"}, {"xmm", "ymm", "zmm"}
    wide = {"isa_avx2": ymm, "isa_avx512_vnni": zmm, "isa_avx512": zmm}
    for path in sorted(sources.glob("*.cpp")):
        code = call("objdump", "-d", "--no-show-raw-insn", optimized(path))
        registers = set(re.findall(r"%([xyz]mm)\d", code))
        assert registers <= wide.get(path.stem, {"xmm"}), path
        if path.stem not in wide:  # instructions with three operands need AVX also on xmm
            assert not re.search(r"^\s+[0-9a-f]+:\s+v[a-z0-9]+ ", code, re.M), path
        else:
            assert registers == wide[path.stem]
