"""A simulated machine with known costs, to test the scheduler: a CPU and a link that share one memory.

Time is simulated, in seconds. The scheduler is told only what it could measure: when a copy was issued, how
long it ran, and how long the CPU took.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Truth(NamedTuple):
    """Bytes/s of each part alone, and `memory`, those of CPU and link together."""

    cpu: float
    link: float
    memory: float
    gpu: float = 800e9
    cpu_latency_s: float = 20e-6
    link_latency_s: float = 10e-6
    dense_s: float = 100e-6
    """Seconds of the GPU's work between the experts of two layers."""


@dataclass
class Copy:
    """A copy on the link. `left`: the seconds it still needs if it has the memory to itself."""

    key: Any
    nbytes: int
    left: float
    began: float | None = None
    ended: float | None = None


@dataclass
class Noise:
    """Varies the time of each job; some take ten times as long; and speeds drift."""

    seed: int = 0
    sigma: float = 0.05
    outliers: float = 0.003
    drift: float = 0.0
    period_s: float = 2.0
    rngs: dict[str, random.Random] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Seed the random numbers of a step, so that every scheduler gets the same ones, whatever it chose
        before."""
        self.rngs = {what: random.Random(f"{self.seed} {step} {what}") for what in ("cpu", "link")}

    def factor(self, what: str, now: float) -> float:
        """How many times its true time a job takes that begins now."""
        rng = self.rngs[what]
        pause = 10.0 if rng.random() < self.outliers else 1.0
        return pause * self.wave(what, now) * math.exp(rng.gauss(0, self.sigma))

    def wave(self, what: str, now: float) -> float:
        """The part of the factor that drifts with time."""
        phase = 0.0 if what == "cpu" else 0.7
        return 1 + self.drift * math.sin(2 * math.pi * (now / self.period_s + phase))


class SimulatedMachine:
    """A fluid simulation: the link works through its queue in order while the CPU computes one call."""

    def __init__(self, truth: Truth, noise: Noise) -> None:
        self.truth, self.noise = truth, noise
        self.now = 0.0
        self.queue: deque[Copy] = deque()
        self._ended: list[Copy] = []
        self.watch: Any = None
        """An observer such as a MissScheduler, or None: it is told of issued copies, and at each `poll` of
        those that have ended."""

    def clock(self) -> float:
        return self.now

    def issue(self, key: Any, nbytes: int) -> Copy:
        """Queue a copy on the link."""
        work = self.truth.link_latency_s + nbytes / self.truth.link * self.noise.factor("link", self.now)
        copy = Copy(key, nbytes, work)
        self.queue.append(copy)
        if self.watch:
            self.watch.issued(key, nbytes)
        return copy

    def poll(self) -> None:
        """Tell the observer of the copies that have ended."""
        for copy in self._ended:
            assert copy.began is not None
            assert copy.ended is not None
            if self.watch:
                self.watch.copied(copy.key, copy.nbytes, copy.ended - copy.began)
        self._ended.clear()

    def compute(self, nbytes: int) -> tuple[float, float]:
        """Let the CPU read `nbytes` of experts, while the link works on; returns (start, end)."""
        start = self.now
        left = self.truth.cpu_latency_s + nbytes / self.truth.cpu * self.noise.factor("cpu", start)
        while left > 1e-12:
            left -= self._advance(left, computing=True)
        return start, self.now

    def sleep_until(self, when: float) -> None:
        """Let time pass until `when`, with only the link at work."""
        while when - self.now > 1e-12:
            self._advance(when - self.now, computing=False)

    def finish(self, copy: Copy) -> float:
        """Wait for a copy to end; returns the time at which it ended."""
        while copy.ended is None:
            self._advance(math.inf, computing=False)
        return copy.ended

    def _advance(self, most: float, *, computing: bool) -> float:
        """Run until the link's copy ends, but for at most `most` seconds of the CPU's work or of idling;
        returns how many of these seconds have passed."""
        truth, link = self.truth, self.queue[0] if self.queue else None
        speed = min(1.0, truth.memory / (truth.cpu + truth.link)) if computing and link else 1.0
        wall = min(most / speed, link.left / speed if link else math.inf)
        self.now += wall
        if link:
            link.began = self.now - wall if link.began is None else link.began
            link.left -= wall * speed
            if link.left <= 1e-12:
                self.queue.popleft()
                link.ended = self.now
                self._ended.append(link)
        return wall * speed


class SimulatedDevice:
    """The Device protocol on a SimulatedMachine: bytes are copied at once, and their time is simulated.

    `drain` runs the work of the compute stream, in order.
    """

    torch_device = torch.device("cpu")

    def __init__(self, machine: SimulatedMachine) -> None:
        self.machine = machine
        self.faults: list[str] = []
        self._stream: list[SimulatedWait | float] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        """Nothing to do: it has no memory of its own."""

    def taken_by_others(self) -> int | None:
        return None

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> SimulatedEvent:
        destination.copy_(source)
        return SimulatedEvent(self.machine, self.machine.issue(None, source.numel()))

    def move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.launch(source, destination.copy_)

    def record(self) -> SimulatedEvent:
        return SimulatedEvent(self.machine, Copy(None, 0, 0.0, self.machine.now, self.machine.now))

    def wait(self, event: SimulatedEvent) -> SimulatedWait:
        waited = SimulatedWait(event.copy)
        self._stream.append(waited)
        return waited

    def idle(self) -> SimulatedDevice:
        return self

    def end(self) -> SimulatedDevice:
        return self

    def seconds(self) -> float:
        return 0.0

    def launch(self, buffer: torch.Tensor, kernel: Any) -> None:
        kernel(buffer)
        self._stream.append(buffer.numel() / (0.85 * self.machine.truth.gpu))

    def drain(self, start: float) -> None:
        """Wait until the device has completed its work, which it began at `start`."""
        busy = start
        for work in self._stream:
            if isinstance(work, SimulatedWait):
                work.end = max(busy, self.machine.finish(work.copy))
                work.start, busy = busy, work.end
            else:
                busy += work
        self._stream.clear()
        self.machine.sleep_until(busy)

    def pass_time(self) -> None:
        """Nothing to do: time passes only by work."""

    def synchronize(self) -> None:
        while self.machine.queue:
            self.machine.finish(self.machine.queue[0])


@dataclass
class SimulatedWait:
    """A wait of the compute stream for a copy, from `start` to `end`, which `drain` sets."""

    copy: Copy
    start: float = 0.0
    end: float = 0.0

    def seconds(self) -> float:
        return self.end - self.start


class SimulatedEvent:
    """The end of a copy."""

    def __init__(self, machine: SimulatedMachine, copy: Copy) -> None:
        self._machine = machine
        self.copy = copy

    def query(self) -> bool:
        return self.copy.ended is not None

    def synchronize(self) -> None:
        self._machine.finish(self.copy)

    def seconds(self) -> float:
        assert self.copy.began is not None
        assert self.copy.ended is not None
        return self.copy.ended - self.copy.began


def run_layer(
    machine: SimulatedMachine, hits: int, nbytes: int, copies: Sequence[Copy], cpu: int
) -> tuple[float, float] | None:
    """Run a layer whose copies were issued already: `hits` and the copied experts on the GPU, `cpu` experts
    on the CPU. Returns the CPU's (start, end), if it computes any."""
    start, gpu = machine.now, nbytes / (0.85 * machine.truth.gpu)
    span = machine.compute(cpu * nbytes) if cpu else None
    busy = start + hits * gpu
    for copy in copies:
        busy = max(busy, machine.finish(copy)) + gpu
    machine.sleep_until(max(busy, machine.now) + machine.truth.dense_s)
    return span
