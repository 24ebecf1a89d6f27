"""Streams that are left when the interpreter ends; tests/offload/test_model.py has all others."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import sys, types

class Fakes(types.ModuleType):  # for modules that would import torch
    def __getattr__(self, name):
        return type(name, (), {"__init__": lambda *values: None})

engine = ("engine", "logprobs", "sampling", "sequence", "text")
for name in (*(f"engine.{part}" for part in engine), "records", "store.leases", "store.store"):
    sys.modules[f"moe_local.offload.{name}"] = Fakes(name)

from moe_local.offload.stream import TokenStream
from moe_local.offload.turn import Turn

class Engine:
    def join(self, *prompt, **how):
        return "a sequence"
    def leave(self, sequence):
        print("left", flush=True)

def begun():
    store = types.SimpleNamespace(snapshot=lambda: 0, tally=lambda: 0)
    stream = TokenStream(Engine(), store, Turn(), [1], types.SimpleNamespace(logprobs=None), None)
    assert stream._begin()
    return stream
"""


def run(*lines: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([HEAD, *lines])], capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


def test_one_that_is_dropped_before_is_closed():
    assert run("stream = begun()", "del stream", "print('end')") == (0, "left\nend\n", "")


@pytest.mark.parametrize(
    "keep",
    [
        "first, second = streams",
        "sys.modules['builtins'].kept = streams",
        "threading.Thread(target=lambda module: time.sleep(600), args=(__main__,), daemon=True).start()",
    ],
)
def test_two_that_are_open_at_the_end(keep):
    """Whatever keeps them; in the last case, the interpreter has cleared the modules that closing needs."""
    assert run("import __main__, threading, time", "streams = [begun(), begun()]", keep) == (0, "", "")
