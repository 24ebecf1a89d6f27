"""A store over a file of random experts, in three set-ups, with access to all of its parts."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from moe_local.cache.beside import Beside
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.cache.ladder import slot_ladder
from moe_local.cache.stats import RouterLoad
from moe_local.offload.quantize.layout import Layout, make_layout
from moe_local.offload.schedule.costs import Costs, Work
from moe_local.offload.schedule.scheduler import MissScheduler, Needed
from moe_local.offload.schedule.split import Split
from moe_local.offload.store.store import ExpertStore, Lease
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device_arena import DeviceArena
from moe_local.offload.tiers.location import Location
from moe_local.offload.tiers.staging import StagedArena
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import FileSource, Load

MODES = ("disk", "ram", "ram+disk")
"""RAM over disk, without a device; a device over RAM that holds all experts; a device over RAM that holds
some, over disk."""


class ReadCounter(FileSource):
    """A FileSource that counts the loads of each expert."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.starts: Counter[ExpertKey] = Counter()

    def start(self, key: ExpertKey, slot: int, priority: int) -> Load:
        self.starts[key] += 1
        return super().start(key, slot, priority)


class Rig:
    """`layers` layers of `experts` experts of different sizes in one file, and an ExpertStore over it.

    `slots`: slots per layer in the fastest tier. `ram_slots`: those in RAM below it, in mode "ram+disk".
    Unless the device is lazy, its kernels run at once, as part of the test.
    """

    def __init__(
        self,
        folder: Path,
        mode: str = "disk",
        *,
        layers: int = 3,
        experts: int = 8,
        slots: int = 3,
        ram_slots: int = 4,
        pages: int = 2,
        piece_bytes: int = 3000,
        threads: int = 3,
        device: Any = None,
        top_k: int = 2,
        seed: int = 0,
        scheduler: Any = None,
        staging: int = 0,
        least: int | None = None,
        sized: bool = False,
    ) -> None:
        """`device`: one for all layers, or a list with one for each. `least`: the fewest slots that a layer
        on a device may have. `sized`: slots have the sizes of a ladder; otherwise each is as large as its
        layer's largest expert."""
        self.least = least
        self.mode, self.num_layers, self.num_experts = mode, layers, experts
        rng = random.Random(seed)
        self.path = folder / f"experts-{layers}-{experts}-{pages}-{seed}"
        self.layouts: list[list[Layout]] = []
        self.content: dict[ExpertKey, bytes] = {}
        self.locations: dict[ExpertKey, Location] = {}
        self._write(rng, pages)
        sizes = [tuple(layout.nbytes for layout in layer) for layer in self.layouts]
        ladders = [slot_ladder(each, top_k) if sized else (max(each),) * experts for each in sizes]
        self.ladders = ladders
        strides = [max(each) for each in sizes]
        ram = [slots if mode == "disk" else experts if mode == "ram" else ram_slots] * layers
        ram = [min(count, experts) for count in ram]
        host = HostArena(ram, ladders)
        in_ram = 0 if mode == "ram" else staging
        ring = HostArena([in_ram], [max(strides)])
        self.disk = ReadCounter(
            self.locations.__getitem__,
            lambda layer, slot: host.view(layer, slot) if slot >= 0 else ring.view(0, ~slot),
            threads=threads,
            piece_bytes=piece_bytes,
        )
        routed = RouterLoad([experts] * layers, [top_k] * layers)
        self.beside = Beside("lru", layers)
        policy = "lru" if mode == "disk" else self.beside
        below = ExpertCache(ram, policy, self.size, in_ram, ladders)
        self.ram = Tier(below, StagedArena(host, ring), self.disk)
        self.device, self.scheduler = device, scheduler
        self.tokens: Callable[[int], int] = lambda expert: 1
        self.on_host = 0
        """How many experts were leased to the host."""
        try:
            self._wire(slots, strides, routed, staging)
        except BaseException:
            self.ram.close()
            raise

    def _wire(self, slots: int, strides: list[int], routed: RouterLoad, staging: int) -> None:
        if self.mode == "disk":
            self.tier = self.ram
            self.store = ExpertStore(self.ram, self.layouts, routed, disk=self.disk)
            return
        least = None if self.least is None else [self.least] * self.num_layers
        arena = self.arena = DeviceArena([slots] * self.num_layers, self.ladders, self.device, least=least)
        staged = StagedArena.beside(arena, staging, max(strides))
        self.copies = CopySource(self.ram, staged, arena.devices, lambda key: self.size(*key))
        cache = ExpertCache(arena.slots, "lru", self.size, staging, self.ladders)
        self.beside.above = cache
        self.tier = Tier(cache, staged, self.copies, arena.devices)
        self.store = ExpertStore(
            self.tier, self.layouts, routed, disk=self.disk, below=self.ram, scheduler=self.scheduler
        )
        if self.mode == "ram":
            self.ram.preload()
            self.disk.starts.clear()

    def _write(self, rng: random.Random, pages: int) -> None:
        offset = 4096
        data = bytearray(offset)
        for layer in range(self.num_layers):
            self.layouts.append([])
            for expert in range(self.num_experts):
                layout = make_layout("raw", [], [("w", "", "uint8", (rng.randint(1, pages) * 4096,))])
                self.layouts[-1].append(layout)
                key = ExpertKey(layer, expert)
                content = self.content[key] = rng.randbytes(layout.nbytes)
                digest = xxhash.xxh3_64_intdigest(content)
                self.locations[key] = Location(self.path, offset, layout.nbytes, digest)
                data += content
                offset += layout.nbytes
        self.path.write_bytes(data)

    def size(self, layer: int, expert: int) -> int:
        return self.layouts[layer][expert].nbytes

    def check_lease(self, layer: int, lease: Lease) -> None:
        """Check that the leased buffer holds the expert's bytes; on a lazy device, when its kernel runs."""
        want = self.content[ExpertKey(layer, lease.expert)]
        assert lease.layout is self.layouts[layer][lease.expert]

        def kernel(buffer: Any) -> None:
            right = buffer.numpy().tobytes() == want
            if not right and self.device is not None:
                self.device_of(layer).faults.append(f"wrong bytes for expert {layer}, {lease.expert}")
            assert right, f"wrong bytes for expert {layer}, {lease.expert}"

        buffer = lease.buffer[: lease.layout.nbytes]
        if lease.on_host:
            self._compute_on_host(ExpertKey(layer, lease.expert), buffer)
        elif self.device is None:
            kernel(buffer)
        else:
            self.device_of(layer).launch(buffer, kernel)

    def _compute_on_host(self, key: ExpertKey, buffer: Any) -> None:
        """Check that the bytes are in RAM, and stay there whatever other transfers happen meanwhile."""
        self.on_host += 1
        own = [self.ram.arena.buffer(0, slot) for slot in (0, ~0)[: 1 + bool(self.ram.cache.staging.slots)]]
        storages = [buffer.untyped_storage().data_ptr() for buffer in own]
        assert buffer.untyped_storage().data_ptr() in storages
        for _ in range(2):
            assert buffer.numpy().tobytes() == self.content[key], f"wrong bytes for expert {key} in RAM"
            assert self.ram.cache.pins(*key) > 0
            self.tier.poll()
            self.device_of(key.layer).pass_time()

    def serve(
        self,
        layer: int,
        experts: Sequence[int],
        requested: Callable[[], None] | None = None,
        recent: Sequence[int] | None = None,
    ) -> Any:
        """Call the store's `serve`; with a scheduler, the host may get a share of the misses."""
        tokens = None if self.scheduler is None else self.tokens
        return self.store.serve(layer, experts, requested, tokens, recent)

    def step(
        self,
        layer: int,
        experts: Sequence[int],
        requested: Callable[[], None] | None = None,
        recent: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Serve all experts, checking every byte; returns the groups in the order of arrival."""
        groups = []
        for group in self.serve(layer, experts, requested, recent):
            assert len({lease.on_host for lease in group}) == 1
            for lease in group:
                self.check_lease(layer, lease)
            groups.append([lease.expert for lease in group])
        assert sorted(expert for group in groups for expert in group) == sorted(experts)
        self.check()
        return groups

    def check(self) -> None:
        """Check that nothing is leased or pinned, that all tables agree, and that devices have no faults."""
        self.store.check_integrity()
        for layer in range(self.num_layers):
            assert [e for e in range(self.num_experts) if self.tier.cache.pins(layer, e)] == []
        assert [device.faults for device in self.devices if device.faults] == []

    def settle_loads(self) -> None:
        """Wait until no load is in flight anywhere; leaves prompts that have begun as they are."""
        for _ in range(10_000):
            for device in self.devices:
                device.synchronize()
            self.tier.poll()
            self.ram.poll()
            if not self.tier.loading and not self.ram.loading:
                break
            self.disk.wait(0.01)
        else:
            raise AssertionError("loads that never end")
        self.check()

    def settle(self) -> None:
        """Wait until no load is in flight anywhere, and check that nothing is pinned below."""
        self.settle_loads()
        if self.tier is not self.ram:
            pinned = [
                (layer, e)
                for layer in range(self.num_layers)
                for e in range(self.num_experts)
                if self.ram.cache.pins(layer, e)
            ]
            assert pinned == [], "pins below that nobody gives back"

    def close(self) -> None:
        self.store.close()
        for device in self.devices:
            device.synchronize()
            assert device.faults == []

    @property
    def devices(self) -> list[Any]:
        """Each device once."""
        if self.device is None:
            return []
        return list(dict.fromkeys(self.device if isinstance(self.device, list) else [self.device]))

    def device_of(self, layer: int) -> Any:
        return self.device[layer] if isinstance(self.device, list) else self.device


class AnyScheduler(MissScheduler):
    """Decides at random, but also calls the real scheduler, so that its bookkeeping is tested."""

    def __init__(self, seed: int = 0, mode: str = "auto") -> None:
        costs = Costs(cpu={1: 1e9}, cpu_latency_s=1e-5, link=1e9, link_latency_s=1e-5, memory=1.5e9, gpu=1e11)
        super().__init__(mode, costs)
        self._random = random.Random(seed)

    def split(self, needed: Sequence[Needed], resident: Sequence[Work]) -> Split:
        chosen = super().split(needed, resident)
        if self.mode == "cpu":
            return chosen
        share = self._random.choice((0.0, 0.5, 0.5, 1.0))
        cpu, link = [], []
        for missing in (*chosen.cpu, *chosen.link):
            (cpu if self._random.random() < share else link).append(missing)
        return Split(tuple(cpu), tuple(link), chosen.seconds)

    def wants_input(self, input_bytes: int, expert: Work) -> bool:
        return super().wants_input(input_bytes, expert) or self._random.random() < 0.8

    def wants_promotion(self, work: Work) -> bool:
        return super().wants_promotion(work) or self._random.random() < 0.5


class ReadGate:
    """Replaces os.preadv: when the gate is shut, reads wait until they are let through; they can be made to
    fail.

    `arrived` has the file offsets of all reads in the order of arrival. The gate is open at first.
    """

    def __init__(self, preadv: Callable[..., int]) -> None:
        self.arrived: list[int] = []
        self.errors: dict[int, Exception] = {}
        """File offset -> the exception that every read there raises."""
        self.most: int | None = None
        """The most bytes of each buffer that one call reads; None: no limit."""
        self._preadv = preadv
        self._permits = 0
        self._shut = False
        self._changed = threading.Condition()

    def shut(self) -> None:
        with self._changed:
            self._shut, self._permits = True, 0

    def open(self) -> None:
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def let(self, count: int = 1) -> None:
        """Let `count` reads through, which may arrive later."""
        with self._changed:
            self._permits += count
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until `count` reads have arrived since the gate was made."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.arrived) >= count, timeout=100), self.arrived

    def __call__(self, file: int, buffers: list[memoryview], offset: int) -> int:
        with self._changed:
            self.arrived.append(offset)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._shut or self._permits > 0)
            self._permits -= self._shut
        if offset in self.errors:
            raise self.errors[offset]
        return self._preadv(file, [buffer[: self.most] for buffer in buffers], offset)
