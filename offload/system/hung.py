"""Work on a disk that may never answer, done in threads that can be left behind.

A read that hangs is ended by no signal and no other thread. Who waits for it can only stop waiting.
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
    """The disk does not answer for `path`; the text is what to say behind its name."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(SLOW.format(seconds))
        self.path = path


class Job(NamedTuple):
    """Something to be done with a file."""

    path: Path
    work: Callable[[], None]


def work_off(jobs: Sequence[Job], threads: int = 1) -> None:
    """Do all jobs, in order, so many at a time, in threads of their own.

    Raises the exception of the first job that failed, once no other is under way, or HungError when none has
    come to its end for as long as a Patience lasts. Then threads are left behind, as daemons, and memory that
    their jobs write to must not be used for anything else.
    """
    if jobs:
        _Crew(jobs, threads).run()


def patiently(path: Path, work: Callable[[], T]) -> T:
    """What `work` returns, which reads `path`. Raises what it does, or HungError."""
    found: list[T] = []
    work_off([Job(path, lambda: found.append(work()))])
    return found[0]


class _Crew:
    """The threads of one `work_off`."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._patience = Patience()
        self._todo = deque(enumerate(jobs))
        self._doing: dict[int, Path] = {}
        """By the number of the thread."""
        self._errors: dict[int, BaseException] = {}
        """By the number of the job."""
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
        except BaseException:  # Ctrl-C: what is under way still writes to the caller's memory
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
            except BaseException as failure:  # whatever it is, the caller's thread is to have it
                error = failure
            with self._changed:
                del self._doing[number]
                if error is not None:
                    self._errors[place] = error
                    self._todo.clear()
                self._patience.moved()
                self._changed.notify()
