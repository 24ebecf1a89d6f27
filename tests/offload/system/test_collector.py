from __future__ import annotations

import gc

import pytest

from moe_local.offload.system.collector import uncollected


@pytest.fixture(autouse=True)
def collecting():
    assert gc.isenabled()
    yield
    gc.enable()


def test_off_inside_on_afterwards():
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_after_an_error():
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_as_a_decorator_for_each_call():
    @uncollected()
    def works() -> bool:
        return gc.isenabled()

    assert [works(), works(), gc.isenabled()] == [False, False, True]


def test_who_turned_it_off_keeps_it_off():
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()
