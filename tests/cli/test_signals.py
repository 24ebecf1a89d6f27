"""Ctrl-C and SIGTERM to real commands at any moment: exit codes, no trace, nothing left behind."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
COMMAND = """
import sys
from moe_local.cli.entry import main
class Told:  # by the first import that the command makes after it has taken the signals
    def find_spec(self, name, path=None, target=None):
        if name == "moe_local.cli.main":
            print("begun", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Told())
main()
"""
LONG = {
    "run": ("run", "MODEL", "hi", "-n", "60000", "--context", "65000"),
    "chat": ("chat", "MODEL", "-n", "4000"),
    "bench": ("bench", "MODEL", "--tokens", "512"),
    "convert": ("convert", "MODEL"),
    "serve": ("serve", "MODEL", "--port", "0"),
}


class Child:
    """A command of its own process, which has got as far as its first line."""

    def __init__(self, home: Path, *arguments: str, code: str = COMMAND) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "MOE_LOCAL_HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        while self._process.stderr.readline() != "begun\n":
            assert self._process.poll() is None
        self._process.stdin.write("hi\n" * 50)
        self._process.stdin.flush()
        self.stdout = self._process.stdout

    @property
    def code(self) -> int | None:
        return self._process.returncode

    def wait(self) -> tuple[str, str]:
        """Until it ends by itself; stdout and stderr."""
        try:
            return self._process.communicate(timeout=200)
        finally:
            self._process.kill()

    def end(self, kind: signal.Signals) -> tuple[int, str]:
        """Exit code and what is on stderr."""
        self._process.send_signal(kind)
        try:
            _, errors = self._process.communicate(timeout=200)
        finally:
            self._process.kill()
        return self._process.returncode, errors


def check(home: Path, kind: signal.Signals, code: int, errors: str) -> None:
    assert "Traceback" not in errors
    assert "Error" not in errors
    assert code == CODES[kind], errors
    assert [path for path in home.rglob("*") if path.suffix in (".tmp", ".partial", ".incomplete")] == []


@pytest.mark.slow
def test_sigterm_in_an_answer_is_143(long_mixtral: Path, endless: tuple[str, ...], tmp_path: Path) -> None:
    child = Child(tmp_path, "run", str(long_mixtral), "hi", *endless)
    child.stdout.read(1)
    check(tmp_path, signal.SIGTERM, *child.end(signal.SIGTERM))


def test_sigint_in_the_first_imports_is_130(tmp_path: Path) -> None:
    check(tmp_path, signal.SIGINT, *Child(tmp_path, "run", "demo", "hi").end(signal.SIGINT))


@pytest.mark.parametrize("kind", CODES)
def test_a_signal_in_torchs_import_ends_the_process_at_once(kind: signal.Signals, tmp_path: Path) -> None:
    """An exception would have to go through C++, which aborts."""
    code = """
import sys
class Told:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            print("begun", file=sys.stderr, flush=True)
            import time
            time.sleep(600)
sys.meta_path.insert(0, Told())
sys.argv = ["moe-local", "run", "demo", "hi"]
from moe_local.cli.entry import main
main()
"""
    check(tmp_path, kind, *Child(tmp_path, code=code).end(kind))


@pytest.mark.parametrize("kind", CODES)
def test_a_signal_in_tritons_import_ends_the_process_at_once(kind: signal.Signals, tmp_path: Path) -> None:
    """The same, with a package that ends as its C++ does."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        "import os, sys, time\nprint('begun', file=sys.stderr, flush=True)\n"
        "try: time.sleep(600)\nexcept BaseException: os.abort()\n"
    )
    code = """
import os, sys
import moe_local.cli.main
from moe_local.cli.entry import main
def command():
    sys.path.insert(0, os.environ["MOE_LOCAL_HOME"])
    import triton
moe_local.cli.main.main = command
main()
"""
    check(tmp_path, kind, *Child(tmp_path, code=code).end(kind))


def test_a_signal_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    """Python tells such an exception as unraisable and goes on."""
    code = """
import os, signal, sys, time
import moe_local.cli.main
from moe_local.cli.entry import main
class Dying:
    def __del__(self):
        print("begun", file=sys.stderr, flush=True)
        time.sleep(600)
def command():
    Dying()
    time.sleep(600)
moe_local.cli.main.main = command
main()
"""
    for kind in CODES:
        check(tmp_path, kind, *Child(tmp_path, code=code).end(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("command", LONG)
def test_signals_at_any_moment(
    command: str, kind: signal.Signals, long_mixtral: Path, tmp_path: Path
) -> None:
    """Six moments from the first import on; what converts is begun anew each time."""
    choose = random.Random(command)
    for number in range(6):
        home = tmp_path / str(number)
        home.mkdir()
        arguments = [str(long_mixtral) if word == "MODEL" else word for word in LONG[command]]
        child = Child(home, *arguments)
        time.sleep(choose.uniform(0, 1 + number))
        code, errors = child.end(kind)
        if code == 0 and (command == "convert" or (command, kind) == ("serve", signal.SIGTERM)):
            assert "Traceback" not in errors  # it was done, or served and stopped in order
            continue
        if code == -kind and command in ("convert", "bench"):
            code = CODES[kind]  # it was done and about to leave: a shell says the same of both
        check(home, kind, code, errors)


def test_what_a_broken_import_leads_to_is_no_error(
    invoke: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As libraries do: catch all around an optional import, and fail for want of it."""
    import moe_local
    from moe_local.offload.system import interrupt

    (tmp_path / "signalled.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    kept = {kind: signal.getsignal(kind) for kind in CODES}

    def restore() -> None:
        for kind, handler in kept.items():
            signal.signal(kind, handler)
        interrupt._deferral.broke_import = None

    request.addfinalizer(restore)
    interrupt.take_signals()

    def load(*_: object, **__: object) -> None:
        try:
            import signalled  # type: ignore[import-not-found] # noqa: F401
        except BaseException:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(moe_local, "load", load, raising=False)
    result = invoke("run", "demo", "hi")
    assert (result.exit_code, result.stderr.strip()) == (130, "")


CAUGHT = """
import os, sys
folder = os.environ["MOE_LOCAL_HOME"]
with open(os.path.join(folder, "signalled.py"), "w") as file:
    file.write("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
sys.path.insert(0, folder)
import moe_local.offload.model as model
encode = model.encode_prompt
def encode_prompt(*arguments, **options):
    try:
        import signalled
    except BaseException:
        pass
    return encode(*arguments, **options)
model.encode_prompt = encode_prompt
from moe_local.cli.entry import main
print("begun", file=sys.stderr, flush=True)
main()
"""


def test_a_sigterm_that_an_import_has_caught_is_not_lost(tmp_path: Path) -> None:
    child = Child(tmp_path, "chat", "demo", code=CAUGHT)
    out, errors = child.wait()
    assert (child.code, out) == (143, "")
    assert "Traceback" not in errors


HUNG = """
import os, sys, threading
import moe_local.offload.tiers.transfer as transfer
from moe_local.cli.entry import main
transfer.CLOSING_S = 0.5
read, left = os.preadv, [60]
def preadv(*arguments):
    left[0] -= 1
    if left[0] < 0:
        print("hung", flush=True)
        threading.Event().wait()
    return read(*arguments)
os.preadv = preadv
print("begun", file=sys.stderr, flush=True)
main()
"""


@pytest.mark.slow
def test_a_disk_that_hangs_for_good_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself with a line that names the file and the seconds, and sooner at SIGTERM."""
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "3")
    command = ("run", "demo", "hi", "-n", "400", "--slots", "2", "--device", "cpu")
    child = Child(tmp_path, *command, code=HUNG)
    out, errors = child.wait()
    assert child.code == 1, errors
    assert "hung" in out
    lines = errors.splitlines()
    assert re.match(
        r"moe-local: expert \d of MoE layer \d in .*layer-0000\d.* given nothing for 3 s", lines[-1]
    )
    assert "is still being read 0 s after the model was closed" in errors
    assert "Traceback" not in errors
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "300")
    child = Child(tmp_path, *command, code=HUNG)
    while not (line := child.stdout.readline()).endswith("hung\n"):
        assert line
    assert child.end(signal.SIGTERM)[0] == 143


HUNG_SOURCE = """
import sys, threading
import moe_local.offload.system.direct_io as direct_io
from moe_local.cli.entry import main
read, left = direct_io._read, [120]
def hangs(found):
    left[0] -= 1
    if left[0] < 0:
        threading.Event().wait()
    read(found)
direct_io._read = hangs
print("begun", file=sys.stderr, flush=True)
main()
"""


@pytest.mark.slow
def test_a_conversion_whose_source_hangs_for_good_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a line, and goes on in the next run."""
    monkeypatch.setenv("MOE_LOCAL_DISK_TIMEOUT", "2")
    command = ("convert", "demo", "--experts", "bf16")
    child = Child(tmp_path, *command, code=HUNG_SOURCE)
    _, errors = child.wait()
    assert child.code == 1, errors
    assert re.match(
        r"moe-local: .*\.safetensors is being read, and its disk has given nothing for 2 s; check the disk",
        errors.splitlines()[-1],
    )
    assert "Traceback" not in errors
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert all(name.endswith(".lock") or name.startswith("layer-") for name in left), left
    assert not any(name.endswith(".tmp") for name in left)
    assert any(name.startswith("layer-") for name in left)
    monkeypatch.delenv("MOE_LOCAL_DISK_TIMEOUT")
    child = Child(tmp_path, *command)
    child.wait()
    assert child.code == 0
