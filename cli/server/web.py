"""The web server under the application: where it listens, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from moe_local.cli.server.app import Server
from moe_local.cli.server.connection import Connection
from moe_local.offload.system.interrupt import IMPATIENCE

GRACE_SECONDS = 30.0
"""How long answers under way may go on after the server was told to stop."""
CUT_SECONDS = 5
"""How long connections then have to take what is written."""
STOPPING = "the server is stopping"


class Web(uvicorn.Server):
    """uvicorn, which says where it listens, and stops in order.

    When it is told to (`stop`, SIGTERM, Ctrl-C) new requests for answers get 503, and those under way have
    `grace_s` seconds. What is left then, or when it is told again, is cut, with an error that says so.
    """

    def __init__(self, server: Server, host: str, port: int, *, grace_s: float = GRACE_SECONDS) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                host=host,
                port=port,
                http=Connection,
                ws="none",
                log_level="warning",
                timeout_graceful_shutdown=CUT_SECONDS,
            )
        )
        self.interrupted = False
        """Whether Ctrl-C was the reason to stop."""
        self._server = server
        self._grace_s = grace_s
        self._told = 0
        """How many signals have asked to stop."""
        self._cut_at: float | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, once it does."""
        sockets = [socket for listening in self.servers for socket in listening.sockets]
        return [socket.getsockname()[:2] for socket in sockets]

    def stop(self) -> None:
        """Any thread; signal handlers, too."""
        again = self._server.traffic.stopping
        self._server.traffic.stopping = True
        self._cut_at = time.monotonic() + (0 if again else self._grace_s)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {kind: signal.signal(kind, self.handle_exit) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for kind, handler in kept.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self._told += 1
        if self._told >= IMPATIENCE:  # a step that hangs holds the batcher, which all else waits for
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        if self.should_exit:
            self.force_exit = True
        self.stop()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for host, port in self.addresses:
            name = f"[{host}]" if ":" in host else host
            url = f"http://{name}:{port}/"
            print(f"{self._server.name} at {url}v1, with a page at {url}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self._cut_at is not None and not self.should_exit:
            cut = time.monotonic() >= self._cut_at
            if cut:
                await asyncio.to_thread(self._server.batcher.close, STOPPING)
            self.should_exit = cut or not self._server.traffic.answering
        return await super().on_tick(counter)


def run(server: Server, host: str, port: int) -> None:
    """Until Ctrl-C, which is raised when all is in order, or SIGTERM."""
    web = Web(server, host, port)
    web.run()
    if web.interrupted:
        raise KeyboardInterrupt
