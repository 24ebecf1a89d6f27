"""Keeps Python's garbage collector out of phases that make many objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Do not collect meanwhile: for imports of large libraries. May be nested, and used as a decorator.

    The modules of torch and transformers have 400 000 objects that live as long as the process. The collector
    looks at all of them again whenever their number has grown by a quarter, a fifth of the imports' time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
