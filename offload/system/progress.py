"""The callback through which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("converting", "loading"), how much of it is done, and how much there is."""
