"""Runs work on a disk that may never answer, in threads that can be left behind.

Neither a signal nor another thread can end a read that hangs; the caller can only stop waiting for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from moe_local.offload.system.patience import LONGEST_WAIT_S, SLOW, Patience

T = TypeVar("T")


class HungError(Exception):
    """The disk of `path` does not answer. The text follows the path in a message."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(SLOW.format(seconds))
        self.path = path


class Job(NamedTuple):
    """Work on a file."""

    path: Path
    work: Callable[[], None]


def work_off(jobs: Sequence[Job], threads: int = 1) -> None:
    """Run all jobs, in order, `threads` of them at a time, in threads of their own.

    Raises the exception of the first job that failed, once no other is running, or HungError when none has
    finished for as long as a Patience lasts. In that case daemon threads are left behind, and memory that
    their jobs write to must not be used for anything else.
    """
    if jobs:
        _Crew(jobs, threads).run()


def patiently(path: Path, work: Callable[[], T]) -> T:
    """Call `work`, which reads `path`, and return its result. Raises what `work` raises, or HungError."""
    found: list[T] = []
    work_off([Job(path, lambda: found.append(work()))])
    return found[0]


class _Crew:
    """The threads of one `work_off`."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._patience = Patience()
        self._todo = deque(enumerate(jobs))
        self._doing: dict[int, Path] = {}
        """Number of a thread -> path of the job that it is running."""
        self._errors: dict[int, BaseException] = {}
        """Number of a job -> its exception."""
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"read-{number}", daemon=True)
            for number in range(min(threads, len(jobs)))
        ]

    def run(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
            self._wait()
        except HungError:
            raise
        except BaseException:  # Ctrl-C: running jobs still write to the caller's memory
            self._give_up()
            self._wait()
            raise
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[min(self._errors)]

    def _wait(self) -> None:
        with self._changed:
            while self._todo or self._doing:
                self._patience.wait(self._changed, LONGEST_WAIT_S)
                if self._doing and self._patience.is_over():
                    self._todo.clear()
                    raise HungError(next(iter(self._doing.values())), self._patience.seconds)

    def _give_up(self) -> None:
        with self._changed:
            self._todo.clear()

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                if not self._todo:
                    return
                place, job = self._todo.popleft()
                self._doing[number] = job.path
            error: BaseException | None = None
            try:
                job.work()
            except BaseException as failure:  # whatever it is, the caller's thread raises it
                error = failure
            with self._changed:
                del self._doing[number]
                if error is not None:
                    self._errors[place] = error
                    self._todo.clear()
                self._patience.moved()
                self._changed.notify()
