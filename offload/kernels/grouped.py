"""The routed experts of a decode step on a GPU: per group of experts, one launch for up and one for down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_local.offload.kernels.contracts import ExpertMath, LayerStep, Readable, Rest
from moe_local.offload.kernels.gates import recognize
from moe_local.offload.kernels.launcher import UNIT, Launcher, can_shuffle, triton_kernels
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.tiers.small_pins import sent

MOST_TOKENS = 8
"""The most tokens of an expert for which reading its weights, once, takes most of the time."""

DECODE_TOKENS = 64
"""The most tokens of a step that counts as decoding. The answers of a prompt in float32 would take memory
that is not planned for, and most of its experts have more than MOST_TOKENS tokens anyway."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupedExperts:
    """Starts steps for layers whose gate the Triton kernels have. There is one instance per store."""

    def __init__(self) -> None:
        self._launchers: dict[tuple[ExpertMath, torch.device], list[tuple[Layout, Launcher | None]]] = {}
        self._refused: list[tuple[torch.device, Layout]] = []
        self._still: list[tuple[torch.device, Layout]] = []
        """Layouts whose kernels do not shuffle although the device can."""

    def serves(self, math: ExpertMath, x: torch.Tensor, routing: Routing, layout: Layout) -> bool:
        """Whether `begin` may be called for this layer and input, which must be on a GPU."""
        return (
            x.is_cuda
            and x.dtype in DTYPES
            and 0 < routing.tokens <= DECODE_TOKENS
            and not torch.is_autocast_enabled("cuda")
            and self.launcher(math, x.device, layout) is not None
        )

    def begin(
        self,
        math: ExpertMath,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        layout: Layout,
        rest: Rest,
    ) -> LayerStep:
        """See LayerKernels.begin; `rest` computes experts with many tokens or of layouts that are not
        served."""
        launcher = self.launcher(math, x.device, layout)
        assert launcher is not None
        return GroupedStep(
            launcher, x, routing, weights, rest, lambda other: self.launcher(math, x.device, other)
        )

    def launcher(self, math: ExpertMath, device: torch.device, layout: Layout) -> Launcher | None:
        """The kernels for this layer, or None. The answer is cached."""
        known = self._launchers.setdefault((math, device), [])
        for other, found in known:
            if _same(other, layout):
                return found
        found = None
        if not _has(self._refused, device, layout):
            found = _launcher(math, device, layout, self.shuffles(device, layout))
        known.append((layout, found))
        return found

    def shuffles(self, device: torch.device, layout: Layout) -> bool:
        """Whether kernels for this layout look up levels by warp shuffles (triton_formats.level)."""
        return can_shuffle(device) and not _has(self._still, device, layout)

    def stop_shuffling(self, device: torch.device, layout: Layout) -> None:
        """From now on, kernels for this layout on this device look up levels in memory."""
        self._still.append((device, layout))
        self._launchers.clear()

    def refuse(self, device: torch.device, layout: Layout) -> None:
        """From now on, do not serve this layout on this device."""
        self._refused.append((device, layout))
        self._launchers.clear()


def _launcher(math: ExpertMath, device: torch.device, layout: Layout, shuffles: bool) -> Launcher | None:
    if not Launcher.served(layout):
        return None
    gate = recognize(math)
    kernels = triton_kernels(device) if gate is not None else None
    if gate is None or kernels is None:
        return None
    return Launcher(kernels, layout, gate, has_gate=math.has_gate, has_bias=math.has_bias, shuffles=shuffles)


class GroupedRun:
    """The buffers of one layer's step, and kernel launches for experts of one layout."""

    def __init__(
        self,
        launcher: Launcher,
        x: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor | None = None,
    ) -> None:
        """x [T, D], weights [T, K]. Answers go to `outputs`, fp32 [T * K, D]; None: to new memory."""
        places, dtype, device = weights.numel(), torch.float32, x.device
        self.outputs = (
            torch.empty(places, launcher.width, dtype=dtype, device=device) if outputs is None else outputs
        )
        """[T * K, D]"""
        self._launcher = launcher
        self._weights = weights.contiguous()
        self._planes = launcher.planes(x.contiguous())
        self._hidden = torch.empty(places, launcher.hidden, dtype=dtype, device=device)
        self._x = x

    def launch(self, base: torch.Tensor, table: torch.Tensor) -> None:
        """Compute the experts of a Launcher's table, whose slots are in UNITs from `base`."""
        self._launcher.up(base, UNIT, table, self._planes, self._hidden, self._weights.shape[1])
        self._launcher.down(base, UNIT, table, self._hidden, self.outputs)

    def result(self) -> torch.Tensor:
        """The weighted sum, [T, D] in the dtype of x."""
        combined = torch.empty(self._x.shape, dtype=self._x.dtype, device=self._x.device)
        self._launcher.combine(self.outputs, self._weights, combined)
        return combined


def warm_up(launcher: Launcher, x: torch.Tensor, top_k: int, base: torch.Tensor) -> list[torch.Tensor]:
    """Launch the kernels once for each number of tokens that they are compiled for, and for both dtypes that
    a router's weights may have, that of x and float32. x [MOST_TOKENS, D]; the slot `base` may hold anything.

    Returns the answers of that slot's expert for the first 1, 2, 4 ... tokens, float32 [tokens, D] each."""
    tokens, answers = 1, []
    while tokens <= MOST_TOKENS:
        weights = torch.zeros(tokens, top_k, dtype=x.dtype, device=x.device)
        run = GroupedRun(launcher, x[:tokens], weights)
        places = [top_k * token for token in range(tokens)]
        run.launch(base, torch.tensor([[0, *places]], device=x.device))
        answers.append(run.outputs[::top_k])
        tokens *= 2
    for dtype in {x.dtype, torch.float32}:
        GroupedRun(launcher, x[:1], torch.zeros(1, top_k, dtype=dtype, device=x.device)).result()
    return answers


class GroupedStep:
    """A LayerStep with two launches per group and layout in it, and one for the sum.

    A group's slots and places reach the device in one small asynchronous copy from pinned memory; torch keeps
    source and target alive until it is done. Passing them as kernel arguments would save that copy, but then
    kernels would be compiled for each number of them, and a kernel that looks up slots could not supply them.

    How many tokens a program of the kernels computes depends only on the routing, never on the group.
    """

    def __init__(
        self,
        launcher: Launcher,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        rest: Rest,
        launcher_for: Callable[[Layout], Launcher | None] = lambda layout: None,
    ) -> None:
        """`launcher_for` returns launchers for layouts other than `launcher`'s, or None if `rest` must
        compute them."""
        self._launcher = launcher
        self._launcher_for = launcher_for
        self._routing = routing
        self._run = GroupedRun(launcher, x, weights)
        self._runs = {id(launcher): self._run}
        self._x, self._weights = x, weights
        self._device = x.device
        self._rest = rest
        self._rest_step: LayerStep | None = None
        self._tokens = _tokens_of_a_program(routing)

    def compute(self, group: Sequence[Readable]) -> None:
        layout = self._launcher.layout
        if self._routing.tokens <= MOST_TOKENS and all(readable.layout is layout for readable in group):
            self._run.launch(group[0].buffer, self.table(group))
            return
        served: dict[int, list[Readable]] = {}
        others: list[Readable] = []
        for readable in group:
            run = self._run_for(readable.layout) if self._has_few(readable.expert) else None
            (others if run is None else served.setdefault(run, [])).append(readable)
        if others:
            self._rest_step = self._rest_step or self._rest(self._run.outputs)
            self._rest_step.compute(others)
        for run, few in served.items():
            self._runs[run].launch(few[0].buffer, self.table(few))

    def _run_for(self, layout: Layout) -> int | None:
        """The key in `_runs` of the GroupedRun for this layout, or None."""
        same = _same(layout, self._launcher.layout)
        launcher = self._launcher if same else self._launcher_for(layout)
        if launcher is not None and id(launcher) not in self._runs:
            self._runs[id(launcher)] = GroupedRun(launcher, self._x, self._weights, self._run.outputs)
        return None if launcher is None else id(launcher)

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        self._run.outputs.index_copy_(0, places, answers)

    def result(self) -> torch.Tensor:
        return self._run.result()

    def _has_few(self, expert: int) -> bool:
        return self._routing.tokens <= MOST_TOKENS or self._routing.counts[expert] <= MOST_TOKENS

    def table(self, group: Sequence[Readable]) -> torch.Tensor:
        """A Launcher's table. Slots are in UNITs from the first expert, since leases know only addresses."""
        base = group[0].buffer.data_ptr()
        slots = [(readable.buffer.data_ptr() - base) // UNIT for readable in group]
        if self._routing.tokens == 1:
            ids = self._routing.ids
            rows = [[slot, ids.index(readable.expert)] for slot, readable in zip(slots, group, strict=True)]
        else:
            starts, places = self._routing.places_of(readable.expert for readable in group)
            flat, rows = places.tolist(), []
            for index, slot in enumerate(slots):
                mine = flat[starts[index] : starts[index + 1]]
                rows.append([slot, *mine, *[-1] * (self._tokens - len(mine))])
        return sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), self._device)


def _tokens_of_a_program(routing: Routing) -> int:
    """The most tokens that an expert of this step has, up to MOST_TOKENS, rounded up to a power of two."""
    if routing.tokens == 1:
        return 1
    counts = (routing.counts[expert] for expert in routing.experts)
    return 1 << (max((count for count in counts if count <= MOST_TOKENS), default=1) - 1).bit_length()


def _same(one: Layout, other: Layout) -> bool:
    return one is other or one == other


def _has(pairs: Sequence[tuple[torch.device, Layout]], device: torch.device, layout: Layout) -> bool:
    return any(device == at and _same(layout, other) for at, other in pairs)
