"""Models in several threads, of which one captures: what waits for it, as far as CUDA is not needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.offload.engine.graphs import CudaGraphs, _session_stream
from moe_local.offload.engine.sampling import draw
from moe_local.offload.expert_file.encoder import ExpertEncoder
from moe_local.offload.gpu.capturing import alone
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.store.residents import Residents
from moe_local.offload.tiers.device import CudaDevice

CARD = torch.device("cuda:0")


class Stream:
    """Counts who is on it."""

    device_index = 0
    users = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def __enter__(self) -> None:
        self.users += 1

    def __exit__(self, *exception: object) -> None:
        self.users -= 1


class Graph:
    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """What all sessions run on."""
    found = Stream()
    monkeypatch.setattr("moe_local.offload.engine.graphs._session_stream", lambda device: found)
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "device": lambda device: Stream(),
        "set_device": lambda device: None,
        "current_blas_handle": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    return found


def elsewhere(what: Callable[[], object]) -> threading.Event:
    """`what` in a thread of its own; set once it is done."""
    done = threading.Event()
    threading.Thread(target=lambda: (what(), done.set()), daemon=True).start()
    return done


def test_sessions_of_two_models_do_not_meet_on_their_stream(stream: Stream) -> None:
    mine, other = CudaGraphs(CARD), CudaGraphs(CARD)
    seen: list[int] = []

    def capture() -> None:
        with other.session():
            other.begin()
            seen.append(stream.users)
            other.end().replay()

    with mine.session():
        done = elsewhere(capture)
        mine.begin()
        assert not done.wait(0.05)
        mine.end().replay()
        assert stream.users == 1
    assert done.wait(100)
    assert seen == [1]


def test_what_a_capture_elsewhere_forbids_waits_for_its_end(stream: Stream) -> None:
    graphs, device = CudaGraphs(CARD), CudaDevice(CARD)
    with graphs.session():
        graphs.begin()
        graph = graphs.end()
    encoder = ExpertEncoder("m", codec_for("nf4"), CARD)
    even = torch.ones(1, 8)
    residents: Any = SimpleNamespace(
        _counts=[([], torch.zeros(3))], _settled=[[0, 0, 0]], _settling=threading.Lock()
    )
    for what in (
        *(graph.replay, device.trim, encoder.close, lambda: draw(even, None)),
        lambda: Residents.settle(residents),
    ):
        with alone:
            done = elsewhere(what)
            assert not done.wait(0.02), what
        assert done.wait(100)
    own = torch.Generator().manual_seed(1)
    with alone:  # no capture knows of that generator
        assert elsewhere(lambda: draw(even, own)).wait(100)


def test_nobody_waits_for_a_whole_device(repository: Path) -> None:
    """CUDA takes that for a wait for what is being captured, whatever the thread."""
    sources = [path for room in ("offload", "cli") for path in (repository / room).rglob("*.py")]
    assert len(sources) > 100
    assert [path for path in sources if "cuda.synchronize(" in path.read_text(encoding="utf-8")] == []


def test_no_copy_is_on_the_stream_of_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models have been loaded: it would be captured, and not happen."""
    made = Counter[int]()

    def stream(device: torch.device, priority: int = 0) -> tuple[int, int]:
        made[priority] += 1
        return priority, made[priority] % 32  # as torch hands them out

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    session = _session_stream.__wrapped__(CARD)
    assert session not in [CudaDevice(CARD)._copy_stream for _ in range(40)]


def test_a_copy_begins_behind_what_its_memory_was_used_for(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands memory out that kernels, already given to their stream, have still to read or write."""
    calls: list[str] = []
    compute = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, device, **options: (calls.append("empty"), empty(*size, **options))[1]
    )
    device = CudaDevice(CARD)

    def wait(other: Stream) -> None:
        assert other is compute
        calls.append("wait")

    monkeypatch.setattr(device._copy_stream, "wait_stream", wait)
    assert device.allocate(100).shape == (100,)
    assert calls == ["empty", "wait"]


def test_a_draw_takes_no_notice_of_nan() -> None:
    broken = torch.full((1, 4), torch.nan)
    assert 0 <= int(draw(broken, None)) < 4
    sure = torch.tensor([[0.0, 1.0, 0.0]])
    assert draw(sure, torch.Generator().manual_seed(0)).shape == ()
    assert int(draw(sure, None)) == 1
