"""Stop strings, wherever the pieces of an answer are cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from moe_local.cli.server.text import StopFilter


@given(
    text=st.text("abcSTOP \n", max_size=30),
    stops=st.lists(st.sampled_from(["STOP", "ab", "\n\n", "c"]), max_size=3, unique=True),
    places=st.lists(st.integers(0, 40), max_size=8),
)
def test_stop_strings(text: str, stops: list[str], places: list[int]) -> None:
    """What is shown is the text up to the first stop string that comes to its end; nothing of it is shown."""
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.add(part) for part in parts)
    if not stop_filter.stopped:
        shown += stop_filter.flush()
    assert stop_filter.stopped == any(stop in text for stop in stops)
    assert stop_filter.stop is None or text[len(shown) :].startswith(stop_filter.stop)
    assert text.startswith(shown)
    if not stop_filter.stopped:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert stop_filter.add("more") == ""
