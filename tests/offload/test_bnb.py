"""bitsandbytes is imported once, quietly, from whichever thread comes first."""

from __future__ import annotations

import subprocess
import sys

FIRST_USE = """
from concurrent.futures import ThreadPoolExecutor
from moe_local.offload.quantize.bnb import bitsandbytes_ops
with ThreadPoolExecutor(8) as pool:
    found = {id(ops) for ops in pool.map(lambda _: bitsandbytes_ops(), range(8))}
assert len(found) == 1
"""


def test_first_use_from_several_threads_is_safe_and_silent() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
