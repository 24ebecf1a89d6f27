"""The module that stands in for the routed experts of a layer, and what it does on a forward."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.kernels.contracts import ExpertMath, LayerStep
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.kernels.grouped import GroupedExperts
from moe_local.offload.kernels.grouped_trial import try_out
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.kernels.shared import SharedStep, Staging, pack, unpack
from moe_local.offload.prefetch.prefetch import Prefetcher
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.schedule.calibrate import measure_cpu
from moe_local.offload.schedule.costs import Work
from moe_local.offload.store.residents import Residents
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.system.interrupt import deferred, is_deferred
from moe_local.offload.system.progress import Progress

COMPILING = "compiling kernels for"
"""A label in a load's progress: takes seconds when a model, or a release of Triton, is used first."""

_TAKEN_OVER = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "config")


class Runner(Protocol):
    """Runs the experts of a layer: the ExpertRunner, or a wrapper that watches, directs or captures."""

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, /
    ) -> torch.Tensor:
        """As OffloadedExperts.forward."""


class TokenPath(Protocol):
    """What serves single tokens, or few, without asking the store: Residents, or DeviceMisses."""

    def layer(self, number: int, math: ExpertMath, x: torch.Tensor, tokens: int) -> object | None:
        """Not None if it serves x [T, D], `tokens` tokens, in this layer."""

    def serves(self, number: int) -> bool:
        """Whether what a capture has recorded of the layer still holds."""

    def run(self, number: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens x [T, D] through a layer, index and weights [T, K] -> [T, D]."""

    def count(self, number: int, used: int | None = None) -> None:
        """Count a step that used so many different experts of the layer; None: as many as the one before."""


class OffloadedExperts(nn.Module):
    """Takes the place of a transformers experts module: same call, but weights come from the ExpertStore.

    It has no parameters and no backward pass. It keeps the original's sizes, activation and gate function, so
    clamps, interleaved gates and the like stay transformers' own. Before `attach` it answers zeros, which is
    enough to find out a model's shapes and wiring without touching an expert.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, original: nn.Module, index: int) -> None:
        """`index`: which MoE layer this is, from 0. `original` may be on the meta device."""
        super().__init__()
        self.index = index
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in original.named_children():
            self.add_module(name, child)  # activation, norms after the experts: small, loaded as usual
        for name in _TAKEN_OVER:
            setattr(self, name, getattr(original, name))
        self.has_post_expert_norm = getattr(original, "has_post_expert_norm", False)  # transformers 5.21
        cls: Any = type(original)
        gate = types.MethodType(cls._apply_gate, self)  # every class that the interface serves has one
        self._apply_gate: Callable[[torch.Tensor], torch.Tensor] = gate
        self._is_hf_initialized = True
        self._runner: Runner | None = None
        self._retired: str | None = None
        self.seam: Runner | None = None
        """Receives forwards instead of `answer`; set during the capture of a forward."""

    def attach(self, runner: Runner | None) -> None:
        """Serve forwards through `runner` from now on; None: answer zeros."""
        self._runner = runner

    @property
    def runner(self) -> Runner | None:
        """What serves forwards; None before `attach` and after `retire`."""
        return self._runner

    def retire(self, reason: str) -> None:
        """Refuse all forwards from now on with MoeLocalError(reason): the weights are gone."""
        self._runner, self._retired = None, reason

    def can_be_captured(self, hidden: torch.Tensor, index: torch.Tensor) -> bool:
        """Whether `answer` does nothing on this input but launch kernels, the same ones each time."""
        runner = self._runner
        return isinstance(runner, ExpertRunner) and runner.path_for(self, hidden, index) is not None

    @property
    def stays_captured(self) -> bool:
        """Whether `answer` would still do what it did when it was captured."""
        return isinstance(self._runner, ExpertRunner) and self._runner.has_path(self.index)

    def count_replay(self) -> None:
        """Count a replay of a captured `answer`, as `answer` itself would have."""
        assert isinstance(self._runner, ExpertRunner)
        self._runner.count_token(self.index)

    def table(self, x: torch.Tensor) -> CpuTable | None:
        """What computes x [T, D], if `forward` would do nothing else but `count`; None if it would."""
        runner = self._runner
        if self.seam is not None or not isinstance(runner, ExpertRunner):
            return None
        return runner.table_for(self, x)

    def count(self, used: int) -> None:
        """Count tokens that went through `table` and used so many different experts."""
        assert isinstance(self._runner, ExpertRunner)
        self._runner.count_token(self.index, used)

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 2F] -> [T, F] with a gate, [T, F] -> [T, F] without."""
        return self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return self.post_expert_norm(output) if self.has_post_expert_norm else output

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, D], index [T, K] int64, weights [T, K] -> [T, D] in hidden's dtype."""
        if self.seam is not None:
            return self.seam.run(self, hidden_states, top_k_index, top_k_weights)
        return self.answer(hidden_states, top_k_index, top_k_weights)

    def answer(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `forward`, but never through `seam`."""
        if self._retired is not None:
            raise MoeLocalError(self._retired)
        if self._runner is None or not hidden_states.numel():
            return torch.zeros_like(hidden_states)
        if is_deferred() and not torch.is_grad_enabled():  # by the engine
            return self._runner.run(self, hidden_states, top_k_index, top_k_weights)
        with deferred(), torch.no_grad():
            output = self._runner.run(self, hidden_states, top_k_index, top_k_weights)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            apply: Callable[..., torch.Tensor] = _NoBackward.apply
            return apply(output, hidden_states, top_k_weights)
        return output


class _NoBackward(torch.autograd.Function):
    """Passes its first argument through, and raises if gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise MoeLocalError(
            "offloaded experts have no backward pass; train the checkpoint with transformers itself"
        )


class ExpertRunner:
    """Runs the routed experts of every layer: ids to the host once, serve, compute, combine."""

    def __init__(self, store: ExpertStore, prefetcher: Prefetcher, activations: str = "native") -> None:
        self.store = store
        self.prefetcher = prefetcher
        self.times_sync = False
        """Whether to time how long a device stands still until the host has learned the router's choice.
        Two events a layer: for measurements."""
        self._kernels = LayerKernels(activations)
        device = store.tier.arena.device
        self._several = len(store.tier.devices) > 1
        self._inputs, self._answers = Staging(device), Staging(device)
        self.token_path: TokenPath | None = None
        """What serves single tokens as far as it can; None: the store does."""

    @property
    def grouped(self) -> GroupedExperts:
        """The kernels that compute a layer's experts together."""
        return self._kernels.grouped

    def keep_residents(self) -> None:
        """Compute single tokens without asking the store, since all experts have slots for good."""
        self.token_path = Residents(self.store, self._kernels)

    def warm_up(
        self,
        modules: Sequence[OffloadedExperts],
        hidden_size: int,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        """Compile the kernels of decode steps, which takes seconds that the first token would take otherwise,
        and try them out. Those with wrong results are not used."""
        cases: list[tuple[torch.device, int, bool, Layout]] = []
        firsts: list[OffloadedExperts] = []
        for module in modules:
            device = self.store.tier.arena.buffer(module.index, 0).device
            for layout in self.store.kinds[module.index]:
                case = (device, self.store.routed.top_k(module.index), module.has_gate, layout)
                if self.grouped.launcher(module, device, layout) is not None and case not in cases:
                    cases.append(case)
                    firsts.append(module)
        for number, (module, (_, top_k, _, layout)) in enumerate(zip(firsts, cases, strict=True)):
            if progress is not None:
                progress(COMPILING, number, len(cases))
            base = self.store.tier.arena.buffer(module.index, 0)
            try_out(self.grouped, layout, math=module, base=base, top_k=top_k, width=hidden_size, dtype=dtype)
        if progress is not None and cases:
            progress(COMPILING, len(cases), len(cases))

    def has_path(self, layer: int) -> bool:
        """Whether single tokens still go through the layer without the store."""
        return self.token_path is not None and self.token_path.serves(layer)

    def count_token(self, layer: int, used: int | None = None) -> None:
        """A step went through the layer by what `path_for` or `table_for` gave; see TokenPath.count."""
        assert self.token_path is not None
        self.token_path.count(layer, used)

    def table_for(self, experts: OffloadedExperts, x: torch.Tensor) -> CpuTable | None:
        """What computes x [T, D] of this layer in CPU memory without the store, or None."""
        if self.token_path is None:
            return None
        found = self.token_path.layer(experts.index, experts, x, x.shape[0])
        return found if isinstance(found, CpuTable) else None

    def path_for(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor
    ) -> TokenPath | None:
        """What computes this forward without the store, or None."""
        if self.token_path is None:
            return None
        layer = self.token_path.layer(experts.index, experts, hidden, index.shape[0])
        return self.token_path if layer is not None else None

    def measure(self, experts: OffloadedExperts, hidden_size: int, dtype: torch.dtype) -> None:
        """Tell the store's scheduler how long the CPU takes for a layer's experts; see measure_cpu."""
        if self.store.host is not None and not experts.has_post_expert_norm:
            measure_cpu(
                self.store.host.scheduler.costs,
                self.store,
                experts,
                self._kernels,
                layer=experts.index,
                hidden_size=hidden_size,
                dtype=dtype,
            )

    def run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As OffloadedExperts.forward. Raises KeyboardInterrupt if a deferred Ctrl-C is pending."""
        check_interrupt()
        if self._several and hidden.is_cuda:
            # Triton launches on the current device, wherever its tensors are.
            with torch.cuda.device(hidden.device):
                return self._run(experts, hidden, index, weights)
        return self._run(experts, hidden, index, weights)

    def _run(
        self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        layer = experts.index
        path = self.path_for(experts, hidden, index)
        if path is not None:
            path.count(layer, index.shape[1] if index.shape[0] == 1 else len(set(index.flatten().tolist())))
            return path.run(layer, hidden, index, weights)
        guesses = self.prefetcher.predict(layer, index.shape[0])
        shared = self._may_share(experts, hidden, index)
        device = self.store.tier.device_of(layer)
        idle = device.idle() if self.times_sync and device is not None else None
        ids, guessed, x = to_host(
            index, [guess.ranked for guess in guesses], hidden if shared else None, self._inputs
        )
        if idle is not None:
            self.store.stalls.add_wait("sync", idle.end())
        routing = Routing(ids, index.shape[0], experts.num_experts)
        step = self._begin(experts, hidden, x, routing, weights)
        groups = self.store.serve(
            layer,
            routing.experts,
            lambda: self.prefetcher.request(layer, routing.experts, guesses, guessed),
            routing.tokens_of if shared else None,
            self._recent(layer, routing),
        )
        try:
            if routing.tokens == 1:
                self.store.routed.count_all(layer, ids)
            else:
                self.store.routed.add(layer, routing.counts)
            for group in groups:
                step.compute(group)
        finally:
            groups.close()
        return step.result()

    def _recent(self, layer: int, routing: Routing) -> list[int] | None:
        """The experts that a long step leaves in the cache for decoding; None for any other step."""
        prefill = self.store.prefill
        return None if prefill is None else prefill.recent(layer, routing.ids, len(routing.experts))

    def _may_share(self, experts: OffloadedExperts, hidden: torch.Tensor, index: torch.Tensor) -> bool:
        """Whether the CPU may compute a part of this layer, for which it needs hidden [T, D], too."""
        share, layer = self.store.host, experts.index
        if share is None or experts.has_post_expert_norm or torch.is_autocast_enabled(hidden.device.type):
            return False  # a norm's weights are on the device, and autocast would choose other dtypes
        if self.store.slots(layer) >= experts.num_experts:
            return False
        kind = self.store.kinds[layer][0]
        average = Work(kind.nbytes, max(1, index.numel() // experts.num_experts), kind.format)
        return share.scheduler.wants_input(hidden.nbytes, average)

    def _begin(
        self,
        experts: OffloadedExperts,
        hidden: torch.Tensor,
        here: torch.Tensor | None,
        routing: Routing,
        weights: torch.Tensor,
    ) -> LayerStep:
        """The step on hidden [T, D]; shared with the host where `here`, hidden on the host, is given."""
        kinds, device = self.store.kinds[experts.index], self.store.tier.device_of(experts.index)
        layout = self._kernels.lead(experts, hidden, kinds)
        step = self._kernels.begin(experts, hidden, routing, weights, layout)
        if here is None or device is None:
            return step
        return SharedStep(
            step,
            self._kernels.answers(experts, here, routing, self._kernels.lead(experts, here, kinds)),
            hidden,
            routing,
            device=device,
            staging=self._answers,
            waited=lambda waited: self.store.stalls.add_wait("cpu", waited),
        )


class OnHost(NamedTuple):
    """The part of a layer's input that is copied to the host."""

    ids: list[int]
    """T * K experts, token by token, in the router's order."""
    guesses: list[list[int]]
    hidden: torch.Tensor | None
    """[T, D] on the CPU, if it was asked for; valid until the next layer."""


def to_host(
    index: torch.Tensor, guesses: list[torch.Tensor], hidden: torch.Tensor | None, staging: Staging
) -> OnHost:
    """The router's choice, the guesses and hidden, if given, in one transfer: one wait for the device."""
    if hidden is None and not guesses and index.shape[0] == 1:
        return OnHost(index.tolist()[0], [], None)
    # A guess may lie on the card of the layer that it is for, or on the host.
    asked = [g.to(index.device) for g in guesses if g.device.type != "cpu" or index.device.type == "cpu"]
    numbers = torch.cat([index.flatten(), *asked]) if asked else index.flatten()
    if hidden is None or hidden.device.type == "cpu":
        flat = numbers.tolist()
    else:
        flat, hidden = unpack(staging.bring(pack(numbers, hidden)), numbers.numel(), hidden)
    lists, start = [], index.numel()
    for guess in guesses:
        if guess.device.type == "cpu" and index.device.type != "cpu":
            lists.append(guess.tolist())
            continue
        lists.append(flat[start : start + guess.numel()])
        start += guess.numel()
    return OnHost(flat[: index.numel()], lists, hidden)
