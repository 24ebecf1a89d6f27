"""`moe-local serve`: a model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.cli.options import LOAD_FLAGS, debug_flag, load_flags
from moe_local.cli.render import ProgressBar

if TYPE_CHECKING:
    from moe_local.cli.server.app import Server

GRACE_SECONDS = 30
"""How long answers under way may go on after the server was told to stop."""
CONNECTIONS = 256


@click.command()
@click.argument("model")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="MOE_LOCAL_HOST",
    show_envvar=True,
    help="Address to listen on; another than this machine's own needs --api-key.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    envvar="MOE_LOCAL_PORT",
    show_envvar=True,
    type=click.IntRange(0, 65535),
    help="Port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="MOE_LOCAL_API_KEY",
    show_envvar=True,
    help="Key that clients must send as Authorization: Bearer KEY.",
)
@click.option(
    "--queue",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    envvar="MOE_LOCAL_QUEUE",
    show_envvar=True,
    help="Requests that may wait; more get 429 and Retry-After.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    envvar="MOE_LOCAL_MAX_TOKENS",
    show_envvar=True,
    help="Most new tokens of an answer; default what the context holds.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    envvar="MOE_LOCAL_TIMEOUT",
    show_envvar=True,
    help="Most seconds of an answer; it then ends with finish_reason length.",
)
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    envvar="MOE_LOCAL_CORS",
    show_envvar=True,
    help="Web pages from this origin may ask, * for all; repeatable.",
)
@load_flags("parallel", *LOAD_FLAGS)
@debug_flag
def serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    queue: int,
    max_tokens: int | None,
    timeout: float | None,
    cors: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    """Serve MODEL to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Requests are answered --parallel at a time, stepped together, so that an expert is fetched once for all.

    \b
    Example:
      moe-local serve mixtral-8x7b --parallel 4
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    """
    if api_key is not None and not api_key.strip():
        raise OptionError("--api-key is empty; give a key, or leave it out")
    if api_key is None and not _is_own(host):
        raise OptionError(
            f"--host {host} lets other machines ask, and there is no key; add --api-key KEY, "
            "or listen on 127.0.0.1"
        )
    from moe_local.cli.server.app import Limits, Server  # FastAPI takes half a second to import

    limits = Limits(api_key=api_key, origins=cors, max_tokens=max_tokens, seconds=timeout)
    _check_port(host, port)
    with ProgressBar() as progress:
        loaded = moe_local.load(model, **options, progress=progress)
    with loaded:
        if loaded.tokenizer is None:
            raise OptionError(
                f"{model} has no tokenizer, and a server's clients send text; add one to its folder"
            )
        batcher = loaded.batcher(queue=queue)
        try:
            run(Server(loaded, batcher, limits), host, port)
        finally:
            batcher.close()


def run(server: Server, host: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM; answers under way then have GRACE_SECONDS to end."""
    import uvicorn

    class Web(uvicorn.Server):
        """Says where it listens once it does, since port 0 takes any, and lets the process end in order."""

        interrupted = False

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            kept = {kind: signal.signal(kind, self.handle_exit) for kind in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for kind, handler in kept.items():
                    signal.signal(kind, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.interrupted = self.interrupted or sig == signal.SIGINT
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for socket in (s for listening in self.servers for s in listening.sockets):
                address = socket.getsockname()
                name = f"[{address[0]}]" if ":" in address[0] else address[0]
                print(f"{server.name} at http://{name}:{address[1]}/v1", file=sys.stderr, flush=True)

    config = uvicorn.Config(
        server.app(),
        host=host,
        port=port,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    web = Web(config)
    web.run()
    if web.interrupted:
        raise KeyboardInterrupt


def _is_own(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    """Raises OptionError where the port is taken: better now than after loading 25 GB."""
    import socket

    if port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from error
