"""Entry and exit of the `moe-local` process: handles signals even during imports and after the command."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from typing import NoReturn

from moe_local.offload.system.interrupt import INTERRUPTED, TERMINATED, Terminated, take_signals


def main() -> NoReturn:
    """Run the command and exit: with 130 after Ctrl-C and 143 after SIGTERM, without a trace, whenever the
    signal arrives."""
    _open_missing_streams()
    _print_anything()
    codes: list[int] = []
    atexit.register(_end, codes)  # before all others, and so called after them
    if threading.current_thread() is threading.main_thread():
        take_signals()
        sys.unraisablehook = _unraisable
    try:
        from moe_local.cli.main import main as command

        command()
    except KeyboardInterrupt:  # in an import, or while an error was being printed
        code: int | str | None = INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    # No cleanup remains, so from now on these signals just end the process.
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, signal.SIG_DFL)
    if code in (INTERRUPTED, TERMINATED):
        _leave(code)
    if code is None or isinstance(code, int):
        codes.append(code or 0)
    sys.exit(code)


def _open_missing_streams() -> None:
    """Open the null device as those of stdin, stdout and stderr that the process was started without.

    Python has None for them, which many libraries trip over; and the next file or connection that is opened
    would have their number, so that what C libraries print would go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: the lowest is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - never closed


def _print_anything() -> None:
    """Let stdout and stderr print ? for characters that their encoding lacks, instead of failing.

    In a locale without UTF-8, an answer would otherwise end with an error at its first emoji.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")


def _end(codes: list[int]) -> None:
    """If the command has ended by itself, end the process with its exit code.

    Else the interpreter would free every object of every module, for which torch and transformers need a
    second. Other threads have ended by now, and other callbacks were called. With a GPU in use it shuts down
    as usual, since drivers and profilers have callbacks of their own, in C.
    """
    torch = sys.modules.get("torch")
    if not codes or (torch is not None and torch.cuda.is_initialized()):
        return
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):  # the interpreter says so, and has an exit code for it
        return
    os._exit(codes[0])


def _leave(code: object) -> NoReturn:
    """End the process now, without the interpreter's usual shutdown.

    That would wait for threads, which may hang on a disk. And whatever the exit code, it ends with SIGINT if
    a Ctrl-C ever came while the source that `dataclass` generates was being executed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """If a signal's exception was raised in a destructor, which drops it, send the signal again instead of
    printing an error."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
        kind = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
        again = threading.Timer(0.01, os.kill, (os.getpid(), kind))
        again.daemon = True
        again.start()
        return
    sys.__unraisablehook__(unraisable)
