"""`moe-local serve`: a model behind an HTTP server for clients of OpenAI and Anthropic."""

from __future__ import annotations

import errno
import ipaddress
from typing import Any

import click

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.cli.completion import model_argument
from moe_local.cli.first_use import ready, yes_flag
from moe_local.cli.options import (
    CHAT_FLAGS,
    WholeNumber,
    debug_flag,
    load_flags,
    template_flags,
    template_variables,
)
from moe_local.cli.render import ProgressBar

OWN_NAMES = ("localhost", "127.0.0.1", "::1")


@click.command()
@model_argument()
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
    type=WholeNumber(0, 65535),
    help="Port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="MOE_LOCAL_API_KEY",
    show_envvar=True,
    help="Key that clients must send, as Authorization: Bearer KEY or X-Api-Key: KEY.",
)
@click.option(
    "--queue",
    default=64,
    show_default=True,
    type=WholeNumber(0),
    envvar="MOE_LOCAL_QUEUE",
    show_envvar=True,
    help="Requests that may wait; more get 429 and Retry-After.",
)
@click.option(
    "--max-tokens",
    type=WholeNumber(1),
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
@click.option(
    "--alias",
    multiple=True,
    metavar="NAME",
    envvar="MOE_LOCAL_ALIAS",
    show_envvar=True,
    help="Clients may ask for the model by this name, too; repeatable.",
)
@template_flags
@yes_flag
@load_flags("parallel", *CHAT_FLAGS)
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
    alias: tuple[str, ...],
    think: bool | None,
    chat_template_kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Serve MODEL to OpenAI and Anthropic clients: chat completions, completions, responses, messages.

    Requests are answered --parallel at a time, stepped together, so that an expert is fetched once for all.
    The page at / is a chat beside a live map of the expert cache; /v1/cache has its figures, /metrics those
    for Prometheus.

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
    from moe_local.cli.server.web import run

    hosts = (*OWN_NAMES, host) if api_key is None else None
    _check_port(host, port)
    ready(model, options)
    with ProgressBar() as progress:
        loaded = moe_local.load(model, **options, progress=progress)
    with loaded:
        if loaded.tokenizer is None:
            raise OptionError(
                f"{model} has no tokenizer, and a server's clients send text; add one to its folder"
            )
        limits = Limits(
            api_key=api_key,
            origins=cors,
            hosts=hosts,
            max_tokens=max_tokens,
            seconds=timeout,
            aliases=alias,
            variables=template_variables(loaded.answers, think, chat_template_kwargs),
        )
        batcher = loaded.batcher(queue=queue)
        try:
            run(Server(loaded, batcher, limits), host, port)
        finally:
            batcher.close()


def _is_own(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    """Raise OptionError if the port is taken or not permitted, before the model is loaded."""
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
        of_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        flag = "--host" if of_host else "--port"
        raise OptionError(f"cannot listen on {host} port {port}: {reason}; choose another {flag}") from error
