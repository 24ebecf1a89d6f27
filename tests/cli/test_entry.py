"""The end of a command's process, which skips the interpreter's teardown of modules."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import pytest

from moe_local.cli import entry

BEFORE = """
import atexit, builtins, sys, threading, time
import moe_local.cli.main
from moe_local.cli.entry import main

class Kept:
    def __del__(self):
        print("torn down", flush=True)

builtins.kept = Kept()  # until the interpreter clears the modules

def command():
"""


def end_of(*lines: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs main with a command of these lines."""
    body = "".join(f"    {line}\n" for line in lines)
    code = f"{BEFORE}{body}\nmoe_local.cli.main.main = command\nmain()"
    options = {"stdout": subprocess.PIPE, **options}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=100, env=buffered, **options
    )


def test_what_is_printed_and_the_exit_code_come_through():
    done = end_of("print('answer')", "sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "answer\n", "")
    done = end_of("print('answer', end='')", "sys.exit()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "answer", "")


def test_threads_and_callbacks_come_first():
    done = end_of(
        "atexit.register(print, 'callback')",
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
        "sys.exit(0)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "thread\ncallback\n", "")


def test_an_error_of_our_own_is_shown():
    done = end_of("raise ZeroDivisionError")
    assert done.returncode == 1
    assert done.stdout == "torn down\n"
    assert done.stderr.endswith("ZeroDivisionError\n")


def test_with_a_gpu_in_use_the_interpreter_shuts_down():
    done = end_of(
        "from types import SimpleNamespace as Fake",
        "sys.modules['torch'] = Fake(cuda=Fake(is_initialized=lambda: True))",
        "sys.exit(4)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "torn down\n", "")


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_the_null_device(closed, tmp_path):
    found = tmp_path / "found"
    numbers = "[stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]"
    lines = (
        "    sys.stdin.isatty(), print('lost'), print('lost', file=sys.stderr)",
        f"    open({str(found)!r}, 'w').write(str({numbers}))",
        "    sys.exit(0)",
    )
    code = "\n".join([BEFORE, *lines, "moe_local.cli.main.main = command", "main()"])
    shell = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], timeout=100, input="", text=True)
    assert done.returncode == 0
    assert found.read_text() == "[0, 1, 2]"


@pytest.mark.parametrize(
    ("encoding", "found"), [("ascii", "d?j? ?"), ("latin-1", "déjà ?"), ("utf-8", "déjà □")]
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding, found, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    line = "print('d\\xe9j\\xe0 \\u25a1', file={})"
    done = end_of(line.format("sys.stdout"), line.format("sys.stderr"), "sys.exit(0)", encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{found}\n", f"{found}\n")


def test_output_that_nobody_reads_is_an_error_as_in_any_program():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        done = end_of("print('answer')", "sys.exit(0)", stdout=broken)
    assert done.returncode == 120
    assert "BrokenPipeError" in done.stderr


def test_a_closed_stdout_is_none(monkeypatch: pytest.MonkeyPatch):
    left: list[int] = []
    monkeypatch.setattr(entry, "sys", types.SimpleNamespace(stdout=None, stderr=sys.stderr, modules={}))
    monkeypatch.setattr(entry, "os", types.SimpleNamespace(_exit=left.append))
    entry._end([])
    assert left == []
    entry._end([5])
    assert left == [5]
