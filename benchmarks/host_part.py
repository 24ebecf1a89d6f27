"""What does the host do for a token, kernels and copies apart: where it brings misses, and where a GPU does?

Method. A store of 48 layers x 128 experts, the shape of Qwen3-30B-A3B, on a fake device that completes all
work at once. Tokens of recorded routes, or of routes drawn with Zipf popularity, pass through every layer
  by host    as in OffloadedExperts: ids to the host, serve, kernels that do nothing
  by device  as after a graph replay: the log that the kernels would have written is put where the host reads
             it, untimed. The next token waits for `before`, giving the token to the device, and `counts`,
             reading the counts of the last one. `meanwhile` is done while the device computes: telling the
             cache and its policies, and making new lists of slots to fill.
Neither includes graph launches or the model around the experts. Times are CPU time of the thread, which never
waits here; medians over the second half of the tokens, one way after the other.
  tenth      of the least time of such a token at NF4: 2.4 GB of dense weights in bf16 and the experts from
             memory, or the misses over the link, whichever takes longer

Run: python benchmarks/host_part.py [--slots 64] [--tokens 200] [--routes FILE] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from time import thread_time
from typing import Any, cast

import torch
from report import finish, parser_of

from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.cache.policies import POLICIES
from moe_local.cache.routes import Phase, read_routes
from moe_local.cache.stats import RouterLoad
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.gpu.device_misses import DeviceMisses
from moe_local.offload.kernels.fetch import LOG_HEAD
from moe_local.offload.prefetch.prefetch import NoPrefetch
from moe_local.offload.quantize.layout import make_layout
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device_arena import DeviceArena
from moe_local.offload.tiers.staging import StagedArena
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import FileSource, Load, LoadState

LAYERS, EXPERTS = 48, 128
DENSE_BYTES, EXPERT_BYTES = 2.4e9, 2437120
MACHINES = {"RTX 4090, PCIe 4": (1.0e12, 25e9), "H200, PCIe 5": (4.0e12, 50e9)}
"""Bytes/s of memory and link."""


class Nothing:
    """A fake device with its events and kernels, all of whose work is complete at once."""

    torch_device = torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, *arguments: object) -> Nothing:
        return self

    def record(self) -> Nothing:
        return self

    def wait(self, event: object) -> Nothing:
        return self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def seconds(self) -> float:
        return 0.0

    def compute(self, group: object) -> None:
        pass

    def result(self) -> torch.Tensor:
        return torch.empty(0)


class Instant:
    """A fake source whose loads are complete as soon as they start."""

    bytes_read = 0

    def __init__(self) -> None:
        self.finished: deque[Load] = deque()

    def start(self, key: ExpertKey, slot: int, priority: int) -> Load:
        load = Load(key, 4096, priority)
        load.state = LoadState.DONE
        self.finished.append(load)
        return load

    def poll(self) -> None:
        pass

    def wait(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


class Layer:
    """The attributes of an OffloadedExperts that this benchmark uses."""

    num_experts, has_post_expert_norm = EXPERTS, False

    def __init__(self, index: int) -> None:
        self.index = index


def make_store(slots: int, top_k: int, policy: str) -> ExpertStore:
    device: Any = Nothing()
    disk: Any = Instant()
    layout = make_layout("raw", [], [("w", "", "uint8", (4096,))])
    host, none = HostArena([EXPERTS] * LAYERS, [4096] * LAYERS), HostArena([0], [4096])
    below = Tier(ExpertCache([EXPERTS] * LAYERS, "lru"), StagedArena(host, none), disk)
    arena = DeviceArena([slots] * LAYERS, [4096] * LAYERS, device)
    staged = StagedArena(arena, DeviceArena([0], [4096], device))
    source = CopySource(below, staged, arena.devices, lambda key: 4096)
    tier = Tier(ExpertCache(arena.slots, policy), staged, source, arena.devices)
    below.preload()
    routed = RouterLoad([EXPERTS] * LAYERS, [top_k] * LAYERS)
    layouts = [[layout] * EXPERTS for _ in range(LAYERS)]
    return ExpertStore(tier, layouts, routed, disk=cast(FileSource, disk), below=below)


def by_host(store: ExpertStore, tokens: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    runner = ExpertRunner(store, NoPrefetch())
    kernels: Any = runner._kernels
    kernels.lead, kernels.begin = (lambda *arguments: None), (lambda *arguments: Nothing())
    layers = [cast(OffloadedExperts, Layer(index)) for index in range(LAYERS)]
    hidden = torch.zeros(1, 8)
    times = []
    for token in tokens:
        given = [(torch.tensor([ids]), torch.ones(1, len(ids))) for ids in token]
        start = thread_time()
        for layer, (index, weights) in zip(layers, given, strict=True):
            runner.run(layer, hidden, index, weights)
        store.tally()
        times.append(thread_time() - start)
    return times


def by_device(
    store: ExpertStore, tokens: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[float, float, float]]:
    """Seconds of each token: (before, counts, meanwhile), as the module's docstring defines them."""
    misses = DeviceMisses(store, cast(Any, None), cast(Any, None))
    store.custody = misses
    follow, meanwhile = misses._follow, 0.0

    def timed(log: Any) -> None:
        nonlocal meanwhile
        began = thread_time()
        follow(log)
        meanwhile = thread_time() - began

    cast(Any, misses)._follow = timed
    misses.begin()
    times = []
    for number, token in enumerate(tokens):
        write(misses, token, number + 1)
        start = thread_time()
        misses.end()
        given = thread_time()
        store.tally()
        counted = thread_time()
        misses.begin()
        times.append((thread_time() - counted + given - start - meanwhile, counted - given, meanwhile))
    return times


def write(misses: DeviceMisses, token: Sequence[Sequence[int]], number: int) -> None:
    """Update tables and log as the look-up kernel would have for this token."""
    for layer, ids in enumerate(token):
        tables = misses.tables.of[layer]
        slot_of, expert_in = tables.slot_of.numpy(), tables.expert_in.numpy()
        known, *listed = tables.order.tolist()
        own = {int(slot_of[e]) for e in ids}
        left = [slot for slot in listed if slot >= 0 and slot not in own]
        left.sort(key=lambda slot: int(tables.used[slot]) > known)
        filled = []
        for expert in ids:
            slot = -1
            if slot_of[expert] < 0:
                slot = left.pop(0)
                if expert_in[slot] >= 0:
                    slot_of[expert_in[slot]] = -1
                slot_of[expert], expert_in[slot] = slot, expert
            filled.append(slot)
            tables.used[int(slot_of[expert])] = number
        tables.log[:LOG_HEAD] = torch.tensor([number, 0, 0, 0])
        tables.log[LOG_HEAD:] = torch.tensor([*ids, *filled])


def drawn(tokens: int, top_k: int, seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    ranks = [rng.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
    weigh = [1 / (rank + 1) for rank in range(EXPERTS)]
    return [
        [sorted(range(EXPERTS), key=lambda e: rng.random() ** (1 / weigh[r[e]]))[-top_k:] for r in ranks]
        for _ in range(tokens)
    ]


def recorded(path: str, tokens: int) -> list[list[list[int]]]:
    steps = list(read_routes(path).phase(Phase.DECODE))
    found = [[list(route.experts) for route in step.layers] for step in steps]
    return [found[number % len(found)] for number in range(tokens)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--routes", metavar="FILE", help="a recording of 48 layers")
    parser.add_argument("--policy", choices=list(POLICIES), default="adaptive")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    routes = options.routes
    tokens = (
        recorded(routes, options.tokens) if routes else drawn(options.tokens, options.top_k, options.seed)
    )
    top_k, half = len(tokens[0][0]), len(tokens) // 2
    with torch.inference_mode():
        store = make_store(options.slots, top_k, options.policy)
        host = statistics.median(by_host(store, tokens)[half:])
        other = make_store(options.slots, top_k, options.policy)
        parts = by_device(other, tokens)[half:]
    before, counts, meanwhile = (statistics.median(part) for part in zip(*parts, strict=True))
    stats = other.snapshot()
    missed = stats.misses / len(tokens)
    result: dict[str, Any] = {
        "benchmark": "host_part",
        "slots": options.slots,
        "top_k": top_k,
        "policy": options.policy,
        "hit_rate": {"by_host": store.snapshot().hit_rate, "by_device": stats.hit_rate},
        "by_host_ms": 1000 * host,
        "by_device_ms": {"before": 1000 * before, "counts": 1000 * counts, "meanwhile": 1000 * meanwhile},
        "tenth_ms": {},
    }
    for name, (memory, link) in MACHINES.items():
        needed = DENSE_BYTES + LAYERS * top_k * EXPERT_BYTES
        result["tenth_ms"][name] = 100 * max(needed / memory, missed * EXPERT_BYTES / link)
    print(f"by host    {1000 * host:.3f} ms a token, {1e6 * host / LAYERS:.1f} us a layer")
    print(f"by device  {1000 * before:.3f} + {1000 * counts:.3f} ms, and {1000 * meanwhile:.3f} meanwhile")
    for name, tenth in result["tenth_ms"].items():
        print(f"a tenth of a token on {name}: {tenth:.3f} ms")
    finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
