"""Triton's interpreter without what it does again and again.

At each call of a function by a kernel it looks through all of Triton's language for what it has replaced
already, which is half of its time. Once for each launch of a kernel is enough.
"""

from __future__ import annotations

from typing import Any

import pytest


class _Nothing:
    """Instead of what was replaced: nothing more was."""

    def restore(self) -> None:
        pass


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone. Where a Triton has no such functions, it stays as it is."""
    from triton.runtime import interpreter

    replace, launch = (
        getattr(interpreter, "_patch_lang", None),
        getattr(interpreter, "GridExecutor", None),
    )
    if replace is None or launch is None:
        return
    run, seen = launch.__call__, set[int]()

    def replaced(fn: Any) -> Any:
        """A function's module decides what is looked through."""
        module = id(fn.__globals__)
        if module in seen:
            return _Nothing()
        seen.add(module)
        return replace(fn)

    def launched(executor: Any, *arguments: Any, **options: Any) -> Any:
        seen.clear()
        return run(executor, *arguments, **options)

    patch.setattr(interpreter, "_patch_lang", replaced)
    patch.setattr(launch, "__call__", launched)
