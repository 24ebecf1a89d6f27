"""Triton's kernels without a GPU: run by its interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moe_local.offload.kernels.gates import CONCATENATED, FUNCTIONS
from moe_local.offload.kernels.launcher import Launcher, planes_of_a_step, rows_of_a_program
from moe_local.offload.native.library import Gate
from moe_local.offload.quantize.layout import TensorSpec
from support.expert_codecs import expert_codec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

GPUS = {75: "RTX 2080", 80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 120: "RTX 5090"}
"""By compute capability, times ten."""

SHAPES = {"mixtral": (4096, 14336), "qwen3": (2048, 768), "gpt-oss": (2880, 2880)}
"""Model width and expert width."""


@pytest.mark.timeout(3600)
def test_cases_in_the_interpreter() -> None:
    """Those of triton_cases.py and of fetch_cases.py, in a process that has not imported Triton before."""
    cases = [Path(__file__).with_name(name) for name in ("triton_cases.py", "fetch_cases.py")]
    # Dealt out one by one, since all of a file by one process is most of what the slow tests take.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "--dist", "load", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *map(str, cases)],
        cwd=cases[0].parent.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[1-9][0-9]* passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout


def compiled(name: str, capability: int, tokens: int, d: int, f: int, format: str = "nf4") -> Any:
    """up_kernel or down_kernel as Launcher would launch it, for a GPU of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_local.offload.kernels import triton_experts

    layout = expert_codec(format).layout(
        [TensorSpec("gate_up_proj", (2 * f, d)), TensorSpec("down_proj", (d, f))]
    )
    silu = Gate(CONCATENATED, FUNCTIONS.index("silu"), 0.0, 0.0)
    launcher = Launcher(triton_experts, layout, silu, has_gate=True, has_bias=False, shuffles=True)
    rows = rows_of_a_program(tokens)
    constants, features = (
        (launcher._up | {"TOP_K": 2}, rows // 2) if name == "up_kernel" else (launcher._down, rows)
    )
    constants = constants | {"TOKENS": tokens, "FEATURES": features}
    constants["PLANES"] = planes_of_a_step(constants["PER_WORD"], tokens)
    warps = constants.pop("num_warps")
    kernel = getattr(triton_experts, name)
    types = {"base": "*u8", "stride": "i32", "planes": "i32", "table": "*i64"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize(
    ("shape", "name"),
    # Rows of 128 pieces at a time, of 64 and of 32, as each kernel meets them.
    [*product(SHAPES, ["up_kernel"]), ("mixtral", "down_kernel"), ("gpt-oss", "down_kernel")],
)
@pytest.mark.parametrize(
    ("capability", "tokens", "format"),
    [
        *((c, 1, "nf4") for c in GPUS),
        *((86, tokens, "nf4") for tokens in (2, 4, 8)),
        (90, 8, "nf4"),
        *((capability, tokens, "int8") for capability, tokens in ((80, 1), (90, 1), (90, 8))),
        *((90, tokens, format) for tokens in (1, 2, 4, 8) for format in ("q3", "q2")),
        *((75, 8, format) for format in ("q3", "q2")),
        *((90, tokens, format) for tokens, format in product((1, 8), ("mxfp4", "fp8"))),
        *((75, 1, format) for format in ("mxfp4", "fp8", "nvfp4")),
        # 8.0 and 8.6 have no E4M3, which its scales are in.
        *((capability, tokens, "nvfp4") for capability, tokens in product((80, 86, 90), (1, 8))),
        (90, 1, "nvfp4, divided"),
    ],
)
def test_weights_are_read_16_bytes_at_a_time_and_stay_in_registers(
    capability: int, tokens: int, format: str, shape: str, name: str, tmp_path: Path
) -> None:
    import triton

    kernel = compiled(name, capability, tokens, *SHAPES[shape], format)
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx))
    planes = {"int8": 4, "fp8": 4, "q3": 16, "q2": 16}.get(format, 8)
    rows = 0 if format == "q3" else rows_of_a_program(tokens)  # which reads its planes by words
    # Each row once, and the planes of each vector that are read at a time.
    assert wide == rows + planes_of_a_step(planes, tokens) * tokens
    # Threads meet for the sums across them, after the loop: Triton exchanges nothing between them before.
    assert len(re.findall(r"bar\.sync", ptx)) <= 6
    assert kernel.metadata.shared <= 1024
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"STACK:(\d+)", usage)
    assert spilled is not None
    assert int(spilled[1]) <= (8 if tokens == 8 else 0)  # bytes a thread: an address kept for after the loop
    if format not in ("int8", "fp8", "q2"):
        code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        # Each thread loads one level, once, and shuffles it, in which all of a warp take part.
        assert len(re.findall(r"\bLDG\.E\.CONSTANT\b", code)) == 1
        shuffles = re.findall(r"(@!?U?P\d+ +)?SHFL\.IDX", code)
        assert len(shuffles) >= planes_of_a_step(planes, tokens) * 4 * rows_of_a_program(tokens)
        assert not any(shuffles)


def test_the_alignment_of_routers_weights_is_nothing_to_compile_for() -> None:
    """What test_warm_up.py takes for granted. All other pointers are told to be multiples of 16."""
    from moe_local.offload.kernels import triton_experts

    for name in ("up_kernel", "down_kernel", "combine_kernel"):
        free = [p.name for p in getattr(triton_experts, name).params if p.do_not_specialize_on_alignment]
        assert free == (["weights"] if name == "combine_kernel" else [])


def compiled_fetch(name: str, capability: int) -> Any:
    """look_up_kernel or fetch_kernel as TritonFetch would launch it for 8 of 128 experts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_local.offload.kernels import fetch, triton_fetch

    if name == "look_up_kernel":
        constants = {"TOP_K": 8, "LISTED": 24, "RANKS": 8, "PLACES": 32, "BEGINS": True, "TIMED": True}
    else:
        constants = {"TOP_K": 8, "UNIT": 16, "WORDS": 2437120 // 4, "BLOCK": fetch.BLOCK, "TIMED": True}
        constants["PROGRAMS"] = fetch.PROGRAMS
    kernel = getattr(triton_fetch, name)
    names = kernel.arg_names
    types = {"memory": "*u8", "base": "*u8"}
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else types.get(n, "*i64") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    options = {"num_warps": 1 if name == "look_up_kernel" else fetch.WARPS, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize("capability", GPUS)
def test_experts_are_brought_16_bytes_at_a_time(capability: int) -> None:
    """Four loads are under way in each thread before the first is stored; the GPU's clock is read."""
    ptx = compiled_fetch("fetch_kernel", capability).asm["ptx"]
    loads = [found.start() for found in re.finditer(r"ld\.global[\w.:]*\.v4\.b32", ptx)]
    stores = [found.start() for found in re.finditer(r"st\.global[\w.:]*\.v4\.b32", ptx)]
    assert len(loads) == len(stores) == 4
    assert max(loads) < min(stores)
    assert "globaltimer" in ptx
    assert re.search(r"atom\.global[\w.:]*\.max\.[us]64", ptx)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize("capability", GPUS)
def test_tables_are_read_before_they_are_written(capability: int) -> None:
    ptx = compiled_fetch("look_up_kernel", capability).asm["ptx"]
    assert "globaltimer" in ptx
    barrier = ptx.rindex("bar.", 0, ptx.index("st.global"))
    assert len(re.findall(r"ld\.global", ptx[:barrier])) >= 7
