"""Plans, before any weight is read, whether a model fits on this machine or on one with the given memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.checkpoint.spec import ModelSpec, model_spec
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.usage import read_usage
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.auto import choose, go_on
from moe_local.offload.plan.free_memory import free_ram, free_vram
from moe_local.offload.plan.nearest import nearest
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Plan, Request, default_context
from moe_local.offload.quantize.mix import AUTO
from moe_local.offload.system.home import moe_local_home


def fit(
    model: str | Path,
    *,
    vram: str | int | Sequence[str | int] | None = None,
    ram: str | int | None = None,
    experts: str = "nf4",
    dense: str = "auto",
    context: int | None = None,
    parallel: int = 1,
    slots: int | None = None,
    device: str | torch.device = "auto",
) -> Plan:
    """Plan `model` without its weights; arguments as in `load()`.

    With `vram`, for a CUDA card of that size, wherever this runs; without, for this machine's GPU if it has
    one, else for its CPU. Budgets left out are what is free here, less a reserve. Needs the model's config
    only. Does not measure: bandwidths are those kept for this machine, or defaults. The plan says by itself
    whether it fits (`plan.fits`); raises OptionError and ModelNotFoundError.
    """
    from moe_local.offload.checkpoint.hub import config_of

    options = LoadOptions(
        vram=vram,  # type: ignore[arg-type]
        ram=ram,  # type: ignore[arg-type]
        experts=experts,
        dense=dense,
        context=context,
        parallel=parallel,
        slots=slots,
        device=device,  # type: ignore[arg-type]
    )
    if options.vram is not None:
        if options.device == "cpu":
            raise OptionError("vram is given but device is cpu, which has none; leave one of them out")
        cards = options.vram if isinstance(options.vram, tuple) else (options.vram,)
    else:
        cards = tuple(free_vram(card) for card in options.torch_devices() if card.type == "cuda")
    spec = model_spec(config_of(model))
    return plan_request(
        Request(
            model=str(model),
            spec=spec,
            ram=free_ram() if options.ram is None else options.ram,
            experts=options.experts,
            dense=options.dense,
            context=_context(options, spec),
            parallel=options.parallel,
            slots=options.slots,
            bandwidths=bandwidth.saved(moe_local_home()),
            budget=options.budget if options.experts == AUTO else None,
        ),
        cards,
    )


def plan_load(
    model: str,
    spec: ModelSpec,
    options: LoadOptions,
    devices: Sequence[torch.device],
    bandwidths: bandwidth.Bandwidths,
    file: ExpertFile | None = None,
    have: Sequence[str] = (),
    begun: Sequence[str] = (),
) -> Plan:
    """The plan that a load on `devices` follows. Budgets are limited to the memory that is free.

    For a converted mix, `file` says which format each expert has and, through its folder, how often it was
    chosen. For experts "auto", `have` are mixes that are already converted, and `begun` the formats of
    interrupted conversions with the same options. The plan says whether it fits.
    """
    ram = free_ram() if options.ram is None else min(options.ram, free_ram(reserve=False))
    cards = []
    for number, device in enumerate(device for device in devices if device.type == "cuda"):
        asked = options.card_vram(number)
        free = free_vram(device, reserve=asked is None)
        cards.append(free if asked is None else min(asked, free))
    return plan_request(
        Request(
            model=model,
            spec=spec,
            ram=ram,
            experts=options.experts if file is None else file.format,
            dense=options.dense,
            context=_context(options, spec),
            parallel=options.parallel,
            slots=options.slots,
            bandwidths=bandwidths,
            mix=None if file is None else file.mix,
            budget=options.budget if options.experts == AUTO else None,
            use=None if file is None else _use(file),
        ),
        cards,
        have,
        begun,
    )


def _use(file: ExpertFile) -> tuple[tuple[int, ...], ...] | None:
    """How often each expert was chosen in earlier runs plus in the text by which the mix was chosen; None if
    neither is known."""
    from moe_local.offload.allocation.allocate import kept_path
    from moe_local.offload.allocation.sensitivity import Sensitivity

    counts = [[0] * len(layer.layouts) for layer in file.layers]
    usage = read_usage(file.folder)
    found: list[Sequence[Sequence[int]]] = [] if usage is None else [usage.counts]
    measured = Sensitivity.read(kept_path(file.name, file.fingerprint), file.fingerprint)
    if measured is not None and measured.text is not None:
        found.append([[round(measured.tokens * use) for use in layer.uses] for layer in measured.layers])
    for each in found:
        if [len(layer) for layer in each] == [len(layer) for layer in counts]:
            pairs = zip(counts, each, strict=True)
            counts = [[a + b for a, b in zip(old, new, strict=True)] for old, new in pairs]
    return tuple(map(tuple, counts)) if any(map(any, counts)) else None


def _context(options: LoadOptions, spec: ModelSpec) -> int:
    return default_context(spec) if options.context is None else options.context


def plan_request(
    request: Request, cards: Sequence[int] = (), have: Sequence[str] = (), begun: Sequence[str] = ()
) -> Plan:
    """Plan a request on cards of so many bytes: on the first one if it holds everything, else on all; without
    cards, in the memory that the request names. A plan that does not fit also names the nearest that does.

    Experts "auto" are replaced by the chosen format in the plan's request; `have` are mixes that are already
    converted, `begun` interrupted conversions to continue.
    """
    if request.experts == AUTO:

        def plan_of(experts: str) -> Plan:
            return _place(replace(request, experts=experts), cards)

        chosen = go_on(plan_of, begun) or choose(plan_of, request.spec, have)
        request = replace(request, experts=chosen)
    plan = _place(request, cards)
    return plan if plan.fits else replace(plan, nearest=nearest(plan.request))


def _place(request: Request, cards: Sequence[int]) -> Plan:
    cards = cards[: request.spec.num_layers]  # each card that is used has at least one decoder layer
    if not cards:
        return place(request)
    plan = place(replace(request, vram=cards[0]))
    if len(cards) == 1 or plan.mode == "resident":
        return plan
    return place(replace(request, vram=sum(cards), cards=tuple(cards)))
