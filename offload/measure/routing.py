"""Records which experts the routers choose (routes), or replaces their choices with those of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe_local.cache.errors import RoutesError
from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep
from moe_local.cache.stats import RouterLoad
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.experts import OffloadedExperts, Runner
from moe_local.offload.model import Model


@contextmanager
def running(model: Model, runner: Runner) -> Iterator[None]:
    """Let `runner` run the experts of all layers; afterwards, attach the earlier runners again.

    Meanwhile the host serves all misses: CUDA graphs in which the device serves them call no runner.
    """
    switch = model.parts.switch
    to_device = switch is not None and switch.on_device
    if switch is not None:
        switch.turn(to_device=False)
    modules = [m for m in model.hf.modules() if isinstance(m, OffloadedExperts)]
    before = [(module, module.runner) for module in modules]
    try:
        for module in modules:
            module.attach(runner)
        yield
    finally:
        for module, earlier in before:
            if earlier is not None:
                module.attach(earlier)
        if switch is not None:
            switch.turn(to_device=to_device)


class RouteRecorder:
    """A runner that records what the routers choose and passes each call on to `inner`.

    In the recording, each answer is a turn and each token a step. `answering` begins a turn; nothing is
    recorded before the first.
    """

    def __init__(self, model: Model, runner: Runner) -> None:
        """Raises RoutesError if layers differ in experts or top-k, which the format cannot express."""
        self.inner = runner
        self._cache = model.parts.store.tier.cache
        self._layouts = model.parts.store.layouts
        spec = model.plan.request.spec
        if len({(layer.num_experts, layer.top_k) for layer in spec.layers}) > 1:
            raise RoutesError(
                f"the layers of {model.name} differ in their experts, which a routes file cannot say"
            )
        self._model = model
        self._turn = -1
        self._steps: dict[tuple[int, int], tuple[Phase, list[LayerRoute]]] = {}
        self._next = 0
        self._first = 0

    def answering(self) -> None:
        """A new answer begins."""
        self._turn += 1
        self._next = 0

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if self._turn >= 0 and len(index):
            self._note(experts.index, index.tolist(), weights.float().tolist())
        return self.inner.run(experts, hidden, index, weights)

    def routes(self) -> Routes:
        """All that was recorded."""
        spec = self._model.plan.request.spec
        width = self._model.plan.request.dtype.itemsize
        sizes = []
        for layer in spec.layers:
            block = ".".join(layer.name.split(".")[: _block_depth(layer.name)])
            dense = sum(t.numel for t in spec.dense if t.name.startswith(block + ".")) * width
            experts = [layout.nbytes for layout in self._layouts[layer.index]]
            sizes.append(LayerBytes(sum(experts) // len(experts), dense))  # the average, if sizes differ
        steps = tuple(
            RouteStep(turn, phase, step, tuple(layers))
            for (turn, step), (phase, layers) in sorted(self._steps.items())
        )
        return Routes(self._model.name, spec.model_type, spec.num_experts, spec.top_k, tuple(sizes), steps)

    def _note(self, layer: int, index: list[list[int]], weights: list[list[float]]) -> None:
        if layer == 0:
            self._first, self._next = self._next, self._next + len(index)
        phase = Phase.PREFILL if self._first == 0 or len(index) > 1 else Phase.DECODE
        for row, (chosen, shares) in enumerate(zip(index, weights, strict=True)):
            resident = tuple(self._cache.is_resident(layer, expert) for expert in chosen)
            moved = (
                0 if here else self._layouts[layer][expert].nbytes
                for here, expert in zip(resident, chosen, strict=True)
            )
            route = LayerRoute(layer, tuple(chosen), tuple(shares), resident, tuple(moved))
            _, layers = self._steps.setdefault((self._turn, self._first + row), (phase, []))
            layers.append(route)


def _block_depth(name: str) -> int:
    """How many parts of a module's path name its decoder layer: those up to the first number."""
    parts = name.split(".")
    return next(depth for depth, part in enumerate(parts, 1) if part.isdigit())


class RoutePlayer:
    """A runner that replaces the router's choices with those of a recording.

    MoE layer l takes the recording's layer l, modulo its number of layers. Prompts take its prefill steps and
    single tokens its decode steps, each in order and, at the end, from the start again. `rewind` goes back to
    the start, so that each repeat gets the same routes.
    """

    def __init__(self, routes: Routes, model: Model, runner: Runner) -> None:
        """Raises RoutesError for a recording of a model with other numbers of experts."""
        check_routes(routes, model.plan.request.spec, model.name)
        self.inner = runner
        self._tables = {phase: _by_layer(routes, phase) for phase in Phase}
        self.top_k = routes.top_k
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first step."""
        self._at = dict.fromkeys(Phase, 0)
        self._start = 0
        self._phase = Phase.PREFILL

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        count = index.shape[0]
        if experts.index == 0:
            self._phase = Phase.PREFILL if count > 1 else Phase.DECODE
            self._start = self._at[self._phase]
            self._at[self._phase] += count
            self._uploaded = self._upload(count, index, weights)
        played, shares = (part[experts.index % len(part)] for part in self._uploaded)
        return self.inner.run(experts, hidden, played.to(index.device), shares.to(weights.device))

    def _upload(
        self, count: int, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights, [layers, T, K] each, of the next `count` tokens. They are copied for all
        layers at once, since each layer would have to wait for a copy of its own."""
        table = self._tables[self._phase]
        chosen = [[steps[(self._start + row) % len(steps)] for row in range(count)] for steps in table]
        experts = [[route.experts for route in tokens] for tokens in chosen]
        shares = [[route.weights for route in tokens] for tokens in chosen]
        return (
            torch.tensor(experts, dtype=index.dtype, device=index.device),
            torch.tensor(shares, dtype=weights.dtype, device=weights.device),
        )


def check_routes(routes: Routes, spec: ModelSpec, name: str) -> None:
    """Raise RoutesError unless the recording can choose experts for the model of this spec and name."""
    origin = Path(routes.model).name
    for layer in spec.layers:
        if layer.num_experts != routes.num_experts:
            raise RoutesError(
                f"the routes are of another model: {origin} has {routes.num_experts} experts a layer, "
                f"{name} has {layer.num_experts}; record some with --record-routes"
            )
    for phase in Phase:
        if not all(_by_layer(routes, phase)):
            raise RoutesError(f"the routes of {origin} have a layer without any {phase.name.lower()} step")


def _by_layer(routes: Routes, phase: Phase) -> list[list[LayerRoute]]:
    """Each layer's routes, from the steps that have it: a prompt's early tokens often lack the last layer."""
    table: list[list[LayerRoute]] = [[] for _ in routes.layers]
    for step in routes.phase(phase):
        for route in step.layers:
            table[route.layer].append(route)
    return table


@contextmanager
def playing(model: Model, routes: Routes) -> Iterator[RoutePlayer]:
    """Let a recording choose the model's experts, which does not count as the model's own use of them."""
    store = model.parts.store
    spec = model.plan.request.spec
    runner = next(m.runner for m in model.hf.modules() if isinstance(m, OffloadedExperts))
    assert runner is not None
    player = RoutePlayer(routes, model, runner)
    own = store.routed
    store.routed = RouterLoad([layer.num_experts for layer in spec.layers], [routes.top_k] * len(spec.layers))
    try:
        with running(model, player):
            yield player
    finally:
        store.routed = own
