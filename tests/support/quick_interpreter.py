"""Triton's interpreter without repeated patching.

At each function call of a kernel, the interpreter goes through all of Triton's language to patch functions
that it has patched already, which takes half of its time. Once per kernel launch is enough.
"""

from __future__ import annotations

from typing import Any

import pytest


class _Nothing:
    """The result of a call that patched nothing, so that there is nothing to restore."""

    def restore(self) -> None:
        pass


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Speed the interpreter up until `patch` is undone; leave a Triton without these functions as it is."""
    from triton.runtime import interpreter

    replace, launch = (
        getattr(interpreter, "_patch_lang", None),
        getattr(interpreter, "GridExecutor", None),
    )
    if replace is None or launch is None:
        return
    run, seen = launch.__call__, set[int]()

    def replaced(fn: Any) -> Any:
        """Patch the language for a function's module, unless that was done in this launch."""
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
