"""Where the `moe-local` process begins and ends: signals, before anything else is imported and after all."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from moe_local.offload.system.interrupt import INTERRUPTED, TERMINATED, Terminated, take_signals


def main() -> NoReturn:
    """Run the command and exit: 130 after Ctrl-C and 143 after SIGTERM, with no trace, wherever they come."""
    if threading.current_thread() is threading.main_thread():
        take_signals()
        sys.unraisablehook = _unraisable
    try:
        from moe_local.cli.main import main as command

        command()
    except KeyboardInterrupt:  # in an import, or while an error was being told
        code: int | str | None = INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    # Nothing is left to be done in order, so these signals just end the process from now on.
    for kind in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, signal.SIG_DFL)
    if code in (INTERRUPTED, TERMINATED):
        _leave(code)
    sys.exit(code)


def _leave(code: object) -> NoReturn:
    """End the process now.

    An interpreter that ends in its usual way waits for threads, which may hang at a disk, and kills itself by
    SIGINT if a Ctrl-C once came while it ran the text of a dataclass, whatever the exit code was to be.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """A signal that came in the middle of a destructor is not lost, nor told as an error: it comes again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
        kind = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
        again = threading.Timer(0.01, os.kill, (os.getpid(), kind))
        again.daemon = True
        again.start()
        return
    sys.__unraisablehook__(unraisable)
