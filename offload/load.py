"""From a name to a loaded model: find, plan, convert, load, wire."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from moe_local.offload.build import build_store
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.hub import config_of, resolve
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.checkpoint.spec import ModelSpec, model_spec
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.graph_trial import graph_mode, use_graphs
from moe_local.offload.engine.graphs import CudaGraphs, Graphs
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.expert_file.convert import convert_experts, expert_file_folder, moe_local_home
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.model import Model
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.fit import plan_load
from moe_local.offload.plan.plan import Plan
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.make import make_prefetcher
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.residents import can_reside, uncounted
from moe_local.offload.schedule.calibrate import first_costs
from moe_local.offload.schedule.scheduler import MissScheduler
from moe_local.offload.store import ExpertStore
from moe_local.offload.tiers.device import CudaDevice, Device

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("converting", "loading"), how much of it is done, and how much there is."""


def load(
    model: str | Path,
    *,
    device: str = "auto",
    vram: str | int | None = None,
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
    progress: Progress | None = None,
) -> Model:
    """Load a model, ready to generate; a context manager, freed by `close()`.

    `model`: an alias ("mixtral-8x7b"), a Hub id, a folder, or "demo". Downloaded and its experts converted
    on first use. `vram` and `ram` bound all that is put there ("20GiB"; None: what is free, less a
    reserve); `slots` fixes the experts kept per MoE layer in the fastest tier instead. `parallel` answers
    can be computed together, each with a context of its own. Whether it fits is known, and refused, before
    anything is downloaded or allocated. Raises MoeLocalError of all kinds.
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
        }
    )
    graph_mode()  # refused before anything is downloaded
    target = options.torch_device()
    name = str(model)
    speeds = bandwidth.saved(moe_local_home())
    plan_load(name, model_spec(config_of(model, carried=False)), options, target, speeds)
    speeds = _measured_links(speeds, options, target)
    checkpoint = Checkpoint.open(resolve(model), name)
    plan = plan_load(name, checkpoint.spec, options, target, speeds)
    gpu = target if target.type == "cuda" else None
    file = open_experts(checkpoint, options.experts, progress=progress, gpu=gpu)
    on_device = CudaDevice(target) if target.type == "cuda" else None
    return assemble(checkpoint, file, plan, options, target, on_device, progress)


def load_made(
    made: Loadable,
    make: Callable[[], ExpertFile],
    options: LoadOptions,
    progress: Progress | None = None,
) -> Model:
    """As `load`, for what is made on this machine: `make` does that, once it is known to fit."""
    target = options.torch_device()
    speeds = _measured_links(bandwidth.saved(moe_local_home()), options, target)
    plan = plan_load(made.name, made.spec, options, target, speeds)
    on_device = CudaDevice(target) if target.type == "cuda" else None
    return assemble(made, make(), plan, options, target, on_device, progress)


def _measured_links(speeds: Bandwidths, options: LoadOptions, target: torch.device) -> Bandwidths:
    """`speeds`, with what the schedule of misses needs of them measured and kept, if it was not yet."""
    if target.type == "cuda" and options.miss != "fetch" and speeds.assumed(("ram", "h2d", "vram")):
        speeds = bandwidth.measure_links(speeds, target)
        bandwidth.save(speeds, moe_local_home())
    return speeds


def convert(
    model: str | Path,
    out: str | Path | None = None,
    experts: str = "nf4",
    *,
    progress: Progress | None = None,
    check: bool = False,
) -> Path:
    """Convert the routed experts of `model` to an expert file and return its folder.

    `out`: where to; default below MOE_LOCAL_HOME, where `load` looks. Finished parts of an earlier run are
    kept; with `check`, those of a finished one are compared with their checksums, too. Raises as `load`.
    """
    codec_for(experts)
    checkpoint = Checkpoint.open(resolve(model), str(model))
    device = LoadOptions().torch_device()
    gpu = device if device.type == "cuda" else None
    open_experts(checkpoint, experts, out, progress=progress, check=check, gpu=gpu)
    return Path(out) if out is not None else _home_folder(checkpoint, experts)


def open_experts(
    checkpoint: Checkpoint,
    experts: str,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
    check: bool = False,
    gpu: torch.device | None = None,
) -> ExpertFile:
    """The expert file of a checkpoint in format `experts`, converted first if need be, on `gpu` if faster."""
    folder = Path(out) if out is not None else _home_folder(checkpoint, experts)

    def report(done: int, total: int, nbytes: int) -> None:
        if progress is not None:
            progress("converting", done, total)

    return convert_experts(checkpoint, codec_for(experts), folder, report, check=check, gpu=gpu)


def _home_folder(checkpoint: Checkpoint, experts: str) -> Path:
    return expert_file_folder(moe_local_home(), checkpoint.name, experts, checkpoint.fingerprint)


class Loadable(Protocol):
    """What is loaded: a Checkpoint, or something made for a measurement."""

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
    file: ExpertFile,
    plan: Plan,
    options: LoadOptions,
    target: torch.device,
    device: Device | None,
    progress: Progress | None = None,
    graphs: Graphs | None = None,
) -> Model:
    """A Model as planned. `device`: what experts are cached on beside RAM; None: they are computed in RAM.

    `graphs` are those of the device; None: CUDA's, where `target` has them.
    """
    hf = load_skeleton(
        checkpoint.folder,
        checkpoint.config,
        dense=options.dense,
        dtype=plan.request.dtype,
        device=target,
        activations=options.activations,
    )
    with contextlib.ExitStack() as undo:
        store = build_store(
            file,
            checkpoint.spec,
            ram_slots=plan.ram_slots,
            vram_slots=plan.vram_slots if device is not None else None,
            device=device,
            policy=options.policy,
            scheduler=_scheduler(options, plan),
        )
        undo.callback(store.close)
        with Probe(hf) as probe:
            cache = probe_cache(hf)
        kv = make_kv(hf, plan.request.parallel, plan.request.context, cache)
        engine = Engine(hf, kv, chunk=plan.chunk)
        prefetcher = make_prefetcher(options.prefetch, plan, store, probe.sites, file)
        runner = ExpertRunner(store, prefetcher, options.activations)
        _fill(store, plan, progress)
        modules = [module for module in hf.modules() if isinstance(module, OffloadedExperts)]
        hidden_size, dtype = checkpoint.spec.hidden_size, plan.request.dtype
        if store.host is not None:
            runner.measure(modules[0], hidden_size, dtype)
        if any(layout.format == "nf4" for layer in store.layouts for layout in layer):
            bitsandbytes_ops()  # its import takes a second, which is not the first token's to wait for
        for module in modules:
            module.attach(runner)
        if device is not None:
            resident = can_reside(store)
            if resident:
                runner.keep_to_device()
            runner.warm_up(modules, hidden_size, dtype)
            if graphs is None and target.type == "cuda":
                graphs = CudaGraphs(target)
            if graphs is not None:
                with uncounted(store):
                    use_graphs(
                        engine,
                        graphs,
                        sites=probe.sites,
                        saw=prefetcher.saw,
                        mode=graph_mode(),
                        stand_in=not resident,
                    )
        model = Model(
            checkpoint.name,
            hf,
            load_tokenizer(checkpoint.folder),
            engine=engine,
            store=store,
            prefetcher=prefetcher,
            plan=plan,
            expert_folder=file.folder,
        )
        undo.pop_all()
    return model


def _scheduler(options: LoadOptions, plan: Plan) -> MissScheduler | None:
    """What decides about misses, where not all of them are fetched. Without a GPU the store asks nobody."""
    if options.miss == "fetch" or plan.mode == "resident":
        return None
    return MissScheduler(options.miss, first_costs(plan.request.bandwidths))


def _fill(store: ExpertStore, plan: Plan, progress: Progress | None) -> None:
    """Bring what has a slot for good: every expert in resident mode, RAM's share where RAM holds all."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("loading", done, total)

    if plan.mode == "offload" and store.below is not None:
        store.below.preload(report)
    elif plan.mode == "resident":
        store.tier.preload(report)
