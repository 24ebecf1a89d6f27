"""What a look at a cache shows."""

from __future__ import annotations

from moe_local.cache.cache_map import CacheMap, CacheView, Cell
from moe_local.cache.expert_cache import ExpertCache

A, R, L, U, M = Cell.ABSENT, Cell.RESIDENT, Cell.LOADING, Cell.USED, Cell.MISSED


def test_what_was_used_between_two_looks() -> None:
    """Expert 0 was there when it was needed, 3 was not; 1 is on its way and 2 was there all along."""
    cache = ExpertCache([4, 1])
    for expert in (0, 2):
        cache.preload(0, expert)
        cache.complete(0, expert)
    view = CacheView(cache, [4, 2])
    assert view.look([[5, 5, 5, 5], [0, 0]]).cells == ((R, A, R, A), (A, A))
    cache.reserve(0, 1)
    for expert in cache.acquire(0, [0, 3]).load:
        cache.complete(0, expert)
    cache.release(0, [0, 3])
    assert view.look([[6, 5, 5, 6], [0, 0]]).cells == ((U, L, R, M), (A, A))
    assert view.look([[6, 5, 5, 6], [0, 0]]).cells == ((R, L, R, R), (A, A))


def test_without_counts_nothing_is_called_used() -> None:
    cache = ExpertCache([1])
    view = CacheView(cache, [2])
    cache.preload(0, 1)
    assert view.look().cells == ((A, L),)
    cache.complete(0, 1)
    assert view.look().cells == ((A, R),)


def test_shrunk_cells_show_the_most_telling_of_several() -> None:
    picture = CacheMap(((A, R, A, A, M), (A, A, L, A, A), (A, A, A, U, A)))
    assert picture.shrunk(3, 5) == tuple(enumerate(picture.cells))
    assert picture.shrunk(2, 3) == ((0, (R, L, M)), (2, (A, U, A)))
    assert picture.shrunk(1, 1) == ((0, (M,)),)
