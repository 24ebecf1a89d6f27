"""bitsandbytes, imported on first use, without messages on the terminal and without network access."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import import_module
from typing import Any

import torch

_importing = threading.Lock()


def bitsandbytes_ops() -> Any:
    """The namespace `torch.ops.bitsandbytes` with its operators registered. The first call takes seconds.

    Safe from any thread: only the first call imports, under a lock, with some modules patched meanwhile.
    """
    with _importing:
        if "bitsandbytes" in sys.modules:
            import_module("bitsandbytes")  # waits until another thread's import is complete
        else:
            with _quiet(), _without_module("kernels"), _compiling_later():
                import_module("bitsandbytes")  # registers the operators
    return torch.ops.bitsandbytes


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the import's warning that, for CPUs with AVX512-BF16, a kernel could not be downloaded."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_module(name: str) -> Iterator[None]:
    """Make `import name` fail meanwhile: on CPUs with AVX512-BF16, bitsandbytes uses it to fetch code from
    the Hub."""
    present, module = name in sys.modules, sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if present:
            sys.modules[name] = module  # type: ignore[assignment]


@contextmanager
def _compiling_later() -> Iterator[None]:
    """Make functions that bitsandbytes passes to `torch.compile` meanwhile compile on their first call.

    Only optimizers and devices without kernels call them; importing the compiler takes more than a second.
    """
    compile = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return partial(later, **options)
        if not str(getattr(function, "__module__", "")).startswith("bitsandbytes."):
            return compile(function, **options)  # called by another thread

        @cache
        def compiled() -> Callable[..., Any]:
            return compile(function, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile
