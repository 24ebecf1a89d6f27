"""Loads a model by its name: find, plan, convert, load, wire."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moe_local.cache.errors import DoesNotFitError, first_line
from moe_local.cache.files import Use
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.answer_format.ends import complete_ends
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.device_map import device_map
from moe_local.offload.checkpoint.hub import config_of, on_this_machine, resolve
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.checkpoint.spec import ModelSpec, meta_model, model_spec
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from moe_local.offload.conversion import begun_conversions, converted_mixes, open_experts
from moe_local.offload.dense.attention import leave_cudnn_out
from moe_local.offload.engine.card_graphs import CardGraphs
from moe_local.offload.engine.encoder_decoder import as_decoder
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.graph_trial import graph_mode, use_graphs
from moe_local.offload.engine.graphs import CudaGraphs, Graphs
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.miss_trial import leave_misses_to_device, miss_mode
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.gpu.custody import Switch
from moe_local.offload.gpu.lost_device import raise_as_one_line
from moe_local.offload.gpu.relief import Relief
from moe_local.offload.gpu.usable import tell_slow
from moe_local.offload.kernels import bnb
from moe_local.offload.model import Model
from moe_local.offload.native.library import library
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.fit import plan_load
from moe_local.offload.plan.plan import Plan
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.make import make_prefetcher
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.mix import AUTO, is_mixed
from moe_local.offload.schedule.calibrate import first_costs
from moe_local.offload.schedule.scheduler import MissScheduler
from moe_local.offload.store.build import build_arena, build_store
from moe_local.offload.store.prefill import announcer
from moe_local.offload.store.residents import can_reside
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.store.uncounted import uncounted
from moe_local.offload.system.home import moe_local_home
from moe_local.offload.system.progress import Progress
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.slow_link import cuda_device, held

logger = logging.getLogger(__name__)


def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    vram: str | int | Sequence[str | int] | None = None,
    ram: str | int | None = None,
    slots: int | None = None,
    experts: str = "nf4",
    activations: str = "native",
    dense: str = "auto",
    context: int | None = None,
    parallel: int = 1,
    policy: str = "adaptive",
    prefetch: str = "auto",
    miss: str = "auto",
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model, ready to generate. It is a context manager; `close()` frees it.

    `model`: an alias ("mixtral-8x7b"), a Hub id, a folder, or "demo". It is downloaded, and its experts are
    converted, on first use. `vram` and `ram` limit everything that is put there ("20GiB"; None: what is free,
    less a reserve); `slots` instead sets how many experts of each MoE layer the fastest tier keeps. Up to
    `parallel` answers can be computed together, each with a context of its own. `chat_template`, text in
    Jinja, replaces the model's own. A model that does not fit is refused before anything is downloaded or
    allocated. Raises MoeLocalError of all kinds.
    """
    options = LoadOptions.from_keywords(
        {
            "device": device,
            "vram": vram,
            "ram": ram,
            "slots": slots,
            "experts": experts,
            "activations": activations,
            "dense": dense,
            "context": context,
            "parallel": parallel,
            "policy": policy,
            "prefetch": prefetch,
            "miss": miss,
            "chat_template": chat_template,
        }
    )
    graph_mode()  # raises for an unknown mode, before anything is downloaded
    miss_mode()
    targets = options.torch_devices()
    target = targets[0]
    name = str(model)
    speeds = bandwidth.saved(moe_local_home())
    if target.type == "cuda" or on_this_machine(model) is None:  # before links are measured, or a download
        plan_load(name, model_spec(config_of(model, to_load=True)), options, targets, speeds).check()
    speeds = _measured_links(speeds, options, target)
    checkpoint = Checkpoint.open(resolve(model), name)
    budget = options.budget if options.experts == AUTO else None
    have, begun = converted_mixes(checkpoint), begun_conversions(checkpoint, budget)
    plan = plan_load(name, checkpoint.spec, options, targets, speeds, have=have, begun=begun).check()
    gpu = target if target.type == "cuda" else None
    misses = MissCost.of_plan(plan) if options.experts == AUTO else None
    experts = plan.request.experts
    file = open_experts(checkpoint, experts, progress=progress, gpu=gpu, misses=misses, budget=budget)
    if isinstance(file, ExpertFile) and is_mixed(file.format):  # whose experts' sizes are known by now
        plan = plan_load(name, checkpoint.spec, options, targets, speeds, file).check()
    targets = targets[: len(plan.cards) or 1]
    cards = [cuda_device(card) for card in targets if card.type == "cuda"]
    return assemble(checkpoint, file, plan, options, targets, cards, progress)


def load_made(
    made: Loadable,
    make: Callable[[], ExpertFile],
    options: LoadOptions,
    progress: Progress | None = None,
) -> Model:
    """As `load`, for a model that is made on this machine, by `make`, once it is known to fit."""
    targets = options.torch_devices()
    speeds = _measured_links(bandwidth.saved(moe_local_home()), options, targets[0])
    plan = plan_load(made.name, made.spec, options, targets, speeds).check()
    targets = targets[: len(plan.cards) or 1]
    cards = [cuda_device(card) for card in targets if card.type == "cuda"]
    return assemble(made, make(), plan, options, targets, cards, progress)


def _measured_links(speeds: Bandwidths, options: LoadOptions, target: torch.device) -> Bandwidths:
    """`speeds`, where those that the scheduler of misses needs have been measured, now if not earlier."""
    if target.type == "cuda" and options.miss != "fetch" and speeds.assumed(("ram", "h2d", "vram")):
        speeds = bandwidth.measure_links(speeds, target)
        bandwidth.save(speeds, moe_local_home())
    return held(speeds)


class Loadable(Protocol):
    """What a model is loaded from: a Checkpoint, or something made for a measurement."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path:
        """With the dense part, and the tokenizer if there is one."""

    @property
    def config(self) -> Any: ...

    @property
    def spec(self) -> ModelSpec: ...


def assemble(
    checkpoint: Loadable,
    file: ExpertFile | NativeExperts,
    plan: Plan,
    options: LoadOptions,
    target: torch.device | Sequence[torch.device],
    device: Device | Sequence[Device] | None,
    progress: Progress | None = None,
    graphs: Graphs | None = None,
) -> Model:
    """A Model as planned.

    `target` is where the dense part goes; `device` is what caches experts above RAM (none: they are computed
    in RAM). Both are one for each card of a plan with several.

    If a device refuses part of the memory planned for experts, the model is made with fewer slots, and its
    plan says so. Raises DoesNotFitError if even the rest does not fit. `graphs` are those of the devices;
    None: CUDA's, if the devices are CUDA's.
    """
    targets = [target] if isinstance(target, torch.device) else list(target)
    cards = list(device) if isinstance(device, Sequence) else [] if device is None else [device]
    first = targets[0]
    # Calls that name no card, pinning above all, use the current one. On a card that the model does not use,
    # they would take hundreds of MB.
    current = torch.cuda.device(first) if first.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            return _assemble(checkpoint, file, plan, options, targets, cards, progress, graphs)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"there is less memory free than was planned with: {first_line(error).rstrip('.')}; "
            "close other programs on the card or set a smaller --vram"
        ) from error
    except RuntimeError as error:
        raise_as_one_line(error)


def _assemble(
    checkpoint: Loadable,
    file: ExpertFile | NativeExperts,
    plan: Plan,
    options: LoadOptions,
    targets: Sequence[torch.device],
    cards: Sequence[Device],
    progress: Progress | None,
    graphs: Graphs | None,
) -> Model:
    tell_slow(targets, plan.request.dtype)
    with contextlib.ExitStack() as undo:
        use = Use(checkpoint.folder if isinstance(file, NativeExperts) else file.folder)
        undo.callback(use.close)
        if any(target.type == "cuda" for target in targets):
            leave_cudnn_out()
        hf = _load_dense(checkpoint, plan, options, targets)
        with Probe(hf) as probe:
            cache = probe_cache(as_decoder(hf))
        kv = make_kv(as_decoder(hf), plan.request.parallel, plan.request.context, cache)
        arena = None
        if cards:  # last of all that is allocated there, since it can do with less
            arena, plan = build_arena(plan, cards)
            undo.callback(arena.close)
        store = build_store(
            file,
            checkpoint.spec,
            ladders=plan.request.ladders,
            ram_slots=plan.ram_slots,
            arena=arena,
            policy=options.policy,
            scheduler=_scheduler(options, plan),
            vram_staging=plan.vram_staging,
            ram_staging=plan.ram_staging,
        )
        undo.callback(store.close)
        if cards:
            plan = replace(plan, vram_staging=store.tier.cache.staging.slots)
        engine = Engine(as_decoder(hf), kv, chunk=plan.chunk, shelf_bytes=plan.shelf_bytes)
        engine.most_context = checkpoint.spec.max_context
        if arena is not None:
            engine.relief = Relief(store.tier, arena, lambda: store.custody.release())
        prefetcher = make_prefetcher(options.prefetch, plan, store, probe.sites, file)
        runner = ExpertRunner(store, prefetcher, options.activations)
        _announce_prompts(hf, store, engine, ahead=options.prefetch != "off")
        _fill(store, plan, progress)
        _attach(hf, runner, checkpoint.spec, plan.request.dtype, progress, on_cards=bool(cards))
        switch = None
        if cards:
            graphs = graphs or _graphs(targets)
            switch = _keep_tokens_to_device(engine, runner, graphs, probe.sites, options.prefetch)
        elif can_reside(store):
            runner.keep_residents()
        gguf = checkpoint.gguf if isinstance(checkpoint, Checkpoint) else None
        tokenizer = load_tokenizer(checkpoint.folder, gguf, options.chat_template)
        model = Model(
            checkpoint.name,
            hf,
            tokenizer,
            engine=engine,
            store=store,
            prefetcher=prefetcher,
            plan=plan,
            expert_folder=file.folder,
            use=use,
            switch=switch,
        )
        complete_ends(hf.generation_config, model.answers)
        undo.pop_all()
    return model


def _load_dense(
    checkpoint: Loadable, plan: Plan, options: LoadOptions, targets: Sequence[torch.device]
) -> Any:
    """The transformers model without its routed experts."""
    return load_skeleton(
        checkpoint.folder,
        checkpoint.config,
        dense=options.dense,
        dtype=plan.request.dtype,
        device=targets[0],
        activations=options.activations,
        device_map=_device_map(checkpoint, plan, targets),
        weights=checkpoint.dense_weights() if isinstance(checkpoint, Checkpoint) else None,
    )


def _announce_prompts(hf: Any, store: ExpertStore, engine: Engine, *, ahead: bool) -> None:
    """Let prompts stream through the store's staging ring, if it has one: a hook announces each forward."""
    if (prefill := store.prefill) is not None:
        prefill.chunk, prefill.ahead = engine.chunk, ahead
        engine_of = weakref.ref(engine)  # which has the model, whose hook this becomes

        def before() -> None:
            store.custody.release()
            if (engine := engine_of()) is not None:
                prefill.chunk = engine.chunk  # shorter since memory ran out

        announce = announcer(prefill, before)
        hf.base_model.register_forward_pre_hook(announce, with_kwargs=True)


def _attach(
    hf: Any,
    runner: ExpertRunner,
    spec: ModelSpec,
    dtype: torch.dtype,
    progress: Progress | None,
    *,
    on_cards: bool,
) -> None:
    """Let the runner serve the model's experts; what takes seconds at the first use is done now."""
    store = runner.store
    modules = [module for module in hf.modules() if isinstance(module, OffloadedExperts)]
    if store.host is not None:
        runner.measure(modules[0], spec.hidden_size, dtype)
    if (on_cards or library() is None) and any(a.format == "nf4" for layer in store.layouts for a in layer):
        bitsandbytes_ops()  # its import takes a second, which is not the first token's to wait for
        for device in store.tier.devices:
            bnb.check(device.torch_device, dtype)
    for module in modules:
        module.attach(runner)
    if on_cards:
        runner.warm_up(modules, spec.hidden_size, dtype, progress)


def _graphs(targets: Sequence[torch.device]) -> Graphs | None:
    """CUDA's graphs, where all of the model is on CUDA devices."""
    if targets[0].type != "cuda":
        return None
    return CardGraphs({target: CudaGraphs(target) for target in targets})


def _keep_tokens_to_device(
    engine: Engine,
    runner: ExpertRunner,
    graphs: Graphs | None,
    sites: Sequence[RouterSite | None],
    prefetch: str,
) -> Switch | None:
    """Compute single tokens without the host (residents, graphs, misses left to the device), as far as trials
    show that this works here and is faster.

    Returns the switch between misses served by the device and by the host; None if the device serves none.
    """
    store, saw = runner.store, runner.prefetcher.saw
    resident = can_reside(store)
    if resident:
        runner.keep_residents()
    if graphs is None:
        return None
    with uncounted(store):
        use_graphs(engine, graphs, sites=sites, saw=saw, mode=graph_mode(), stand_in=not resident)
    return leave_misses_to_device(
        engine, runner, graphs, sites=sites, saw=saw, mode=miss_mode(), prefetch=prefetch
    )


def _device_map(checkpoint: Loadable, plan: Plan, targets: Sequence[torch.device]) -> dict[str, str] | None:
    """Where each part of the model goes; None: all to one device."""
    if len(plan.cards) < 2:
        return None
    return device_map(meta_model(checkpoint.config), [card.layers.stop for card in plan.cards], targets)


def _scheduler(options: LoadOptions, plan: Plan) -> MissScheduler | None:
    """The scheduler of misses; None if all of them are fetched. Without a GPU the store does not use it."""
    if options.miss == "fetch" or plan.mode == "resident":
        return None
    return MissScheduler(options.miss, first_costs(plan.request.bandwidths))


def _fill(store: ExpertStore, plan: Plan, progress: Progress | None) -> None:
    """Preload experts that have permanent slots: all in resident mode, those of RAM where RAM holds all."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("loading", done, total)

    if plan.mode == "offload" and store.below is not None:
        store.below.preload(report)
    elif plan.mode == "resident":
        store.tier.preload(report)
