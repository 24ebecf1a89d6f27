"""Places a model's parts in the tiers, by their bytes, and decides whether it fits at all.

The dense part, the KV cache and the workspace come first in the fastest tier (VRAM with a GPU, else RAM). The
rest of it becomes expert slots, equally many for each MoE layer, and one more for as many layers as possible.
With a GPU, RAM holds all experts or as many as it can; the rest is read from disk. Snapshots of states lie in
RAM, too. What counts is the total parameters, not the active ones, since any expert may be needed next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_local.cache.keys import format_bytes
from moe_local.cache.ladder import arena_bytes
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.plan import footprint
from moe_local.offload.plan.cards import Cards, kv_of_a_layer, layers_by_card, refusal
from moe_local.offload.plan.plan import Bytes, Ladders, Mode, Plan, Request, largest


def place(request: Request) -> Plan:
    """Place the model. A plan that does not fit says what is missing and by how much; never raises."""
    if request.cards:
        return _place_on_cards(request)
    spec, cuda = request.spec, request.vram is not None
    ladders = request.ladders
    kept = request.snapshot_bytes
    budget = request.ram - kept if request.vram is None else request.vram
    fastest = _slots(spec, spec.top_k if request.slots is None else request.slots)
    chunk, staging, parts = _chunk(request, ladders, budget - arena_bytes(fastest, ladders), fastest)
    if parts.fixed + arena_bytes(fastest, ladders) > budget:
        overhead = footprint.cuda_overhead(budget) if cuda else 0
        needed = parts.fixed - overhead + arena_bytes(fastest, ladders)
        needed = footprint.with_cuda_overhead(needed) if cuda else needed + kept
        return _refusal(request, parts, chunk, in_vram=cuda, needed=needed)
    if request.slots is None and chunk == _full_chunk(request, parts.experts_total):
        fastest, staging = _with_ring(spec, ladders, budget - parts.fixed)
    if not cuda:
        mode: Mode = "resident" if fastest == _all_slots(spec) else "disk"
        none = (0,) * len(spec.layers)
        return Plan(request, True, mode, parts, chunk, none, fastest, ram_staging=staging)
    needed = arena_bytes(_slots(spec, spec.top_k), ladders) + request.snapshot_bytes
    if needed > request.ram:
        return _refusal(request, parts, chunk, in_vram=False, needed=needed)
    return _over_ram(Plan(request, True, None, parts, chunk, fastest, fastest, vram_staging=staging))


def _place_on_cards(request: Request) -> Plan:
    """`place` where there are several cards."""
    spec, ladders = request.spec, request.ladders
    least = spec.top_k if request.slots is None else min(request.slots, spec.num_experts)
    total = arena_bytes(_all_slots(spec), ladders)
    full = _full_chunk(request, total)
    chunk, on = _chunk_on_cards(request, least, full)
    found = on.cut(least)
    count = len(request.cards)
    overheads = sum(footprint.cuda_overhead(card) for card in request.cards)
    parts = Bytes(
        dense=footprint.dense_bytes(spec, request.dense, cuda=True),
        kv=spec.num_layers * kv_of_a_layer(request),
        workspace=count * on.workspace + overheads,
        expert=largest(ladders),
        experts_total=total,
    )
    none = (0,) * len(spec.layers)
    if found is None:
        lacking = on.shortfall(least)
        reason = refusal(request, lacking, least)
        return Plan(request, False, None, parts, chunk, none, none, shortfall_bytes=lacking, reason=reason)
    needed = arena_bytes(_slots(spec, spec.top_k), ladders) + request.snapshot_bytes
    if needed > request.ram:
        return _refusal(request, parts, chunk, in_vram=False, needed=needed)
    slots = list(_slots(spec, least))
    # A long enough ring, unless every expert gets a slot, takes precedence over more than the least slots.
    ringed = on.staging == footprint.staging_slots(spec, largest(ladders)) or on.holds(spec.num_experts)
    if request.slots is None and chunk == full and ringed:
        for card, mine in zip(found, layers_by_card(found, spec), strict=True):
            if mine:
                part = replace(spec, layers=tuple(spec.layers[index] for index in mine))
                left = card.vram - card.fixed - on.ring
                most = _most_slots(part, tuple(ladders[index] for index in mine), left)
                for index, each in zip(mine, most, strict=True):
                    slots[index] = each
    plan = Plan(request, True, None, parts, chunk, tuple(slots), none, vram_staging=on.staging, cards=found)
    return _over_ram(plan)


def _chunk_on_cards(request: Request, least: int, full: int) -> tuple[int, Cards]:
    """`_chunk` for several cards, with the staging ring, by the same rules; `full`: the longest chunk."""
    spec, chunk, shortest = request.spec, full, 2 * footprint.MIN_CHUNK
    while not (on := Cards.of(request, chunk)).holds(least) and chunk >= shortest:
        chunk //= 2
    resident = request.slots is None and chunk == full and on.holds(spec.num_experts)
    if resident or least == spec.num_experts or not on.holds(least):
        return chunk, on
    ringed = on.with_ring(least)
    if not ringed.staging and chunk >= shortest:
        shorter = Cards.of(request, chunk // 2).with_ring(least)
        if shorter.staging:
            return chunk // 2, shorter
    return chunk, ringed


def _over_ram(plan: Plan) -> Plan:
    """Complete a plan of VRAM with the slots of RAM."""
    request, spec = plan.request, plan.request.spec
    ladders, everything = request.ladders, _all_slots(spec)
    if plan.vram_slots == everything:  # experts only pass through RAM
        return replace(plan, mode="resident", ram_slots=_slots(spec, spec.top_k), ram_staging=0)
    below, staging = _with_ring(spec, ladders, request.ram - request.snapshot_bytes)
    mode: Mode = "offload" if below == everything else "disk"
    return replace(plan, mode=mode, ram_slots=below, ram_staging=staging)


def with_vram_slots(plan: Plan, slots: Sequence[int]) -> Plan:
    """A fitting plan for a GPU, changed to these VRAM slots; the same plan if it has them already."""
    return plan if tuple(slots) == plan.vram_slots else _over_ram(replace(plan, vram_slots=tuple(slots)))


def _full_chunk(request: Request, experts_total: int) -> int:
    return footprint.longest_chunk(request.spec, request.context, request.dtype, experts_total)


def _chunk(request: Request, ladders: Ladders, room: int, slots: Sequence[int]) -> tuple[int, int, Bytes]:
    """(the longest prefill chunk whose workspace leaves room for the least slots, the staging slots that fit
    beside it, the bytes of the parts with that chunk).

    `room`: the budget without the least slots. The chunk is shortened only where no more than the least slots
    fit, so a larger budget never has fewer slots. If no staging ring fits, the chunk is halved once more if
    that makes room for one: a ring hides reading behind computing, which gains at least as much as reading
    half as often.
    """
    spec, dtype = request.spec, request.dtype
    overhead = 0 if request.vram is None else footprint.cuda_overhead(request.vram)
    experts_total = arena_bytes(_all_slots(spec), ladders)
    chunk = footprint.longest_chunk(spec, request.context, dtype, experts_total)
    fixed = footprint.dense_bytes(spec, request.dense, cuda=request.vram is not None)
    kv = request.parallel * footprint.kv_bytes(spec, request.context, dtype)
    in_place = request.vram is None and footprint.reads_in_place(spec, request.experts, request.mix)

    def parts(chunk: int) -> Bytes:
        workspace = (
            footprint.workspace_bytes(spec, chunk, request.context, dtype, in_place=in_place) + overhead
        )
        return Bytes(fixed, kv, workspace, largest(ladders), experts_total)

    while parts(chunk).fixed > room and chunk // 2 >= footprint.MIN_CHUNK:
        chunk //= 2
    if tuple(slots) == _all_slots(spec):
        return chunk, 0, parts(chunk)
    staging = _ring(spec, ladders, room - parts(chunk).fixed)
    if not staging and chunk // 2 >= footprint.MIN_CHUNK:
        staging = _ring(spec, ladders, room - parts(chunk // 2).fixed)
        chunk = chunk // 2 if staging else chunk
    return chunk, staging, parts(chunk)


def _ring(spec: ModelSpec, ladders: Ladders, room: int) -> int:
    """How many staging slots fit in `room` bytes; 0 for fewer than two, since one loads while another is
    read."""
    slots = min(footprint.staging_slots(spec, largest(ladders)), max(0, room) // largest(ladders))
    return slots if slots >= 2 else 0


def _with_ring(spec: ModelSpec, ladders: Ladders, room: int) -> tuple[tuple[int, ...], int]:
    """(the most slots within `room` bytes, the staging slots). Staging slots take precedence over all but the
    least slots; there are none if every expert has a slot."""
    everything, least = _all_slots(spec), _slots(spec, spec.top_k)
    if arena_bytes(everything, ladders) <= room:
        return everything, 0
    staging = _ring(spec, ladders, room - arena_bytes(least, ladders))
    if staging < footprint.staging_slots(spec, largest(ladders)):
        return least, staging
    return _most_slots(spec, ladders, room - staging * largest(ladders)), staging


def _slots(spec: ModelSpec, count: int) -> tuple[int, ...]:
    return tuple(min(count, layer.num_experts) for layer in spec.layers)


def _all_slots(spec: ModelSpec) -> tuple[int, ...]:
    return _slots(spec, spec.num_experts)


def _most_slots(spec: ModelSpec, ladders: Ladders, room: int) -> tuple[int, ...]:
    """The most slots within `room` bytes: equally many for each layer (at most its experts), then one more in
    the first layers, which prefetch predicts worst, up to the first layer where it does not fit. So with more
    room, no layer ever has fewer slots."""
    low, high = 0, spec.num_experts
    while low < high:
        middle = (low + high + 1) // 2
        if arena_bytes(_slots(spec, middle), ladders) <= room:
            low = middle
        else:
            high = middle - 1
    slots = list(_slots(spec, low))
    room -= arena_bytes(slots, ladders)
    for index, layer in enumerate(spec.layers):
        if slots[index] < layer.num_experts:
            size = ladders[index][slots[index]]
            if size > room:
                break
            slots[index] += 1
            room -= size
    return tuple(slots)


def _refusal(request: Request, parts: Bytes, chunk: int, *, in_vram: bool, needed: int) -> Plan:
    spec = request.spec
    tier, budget = ("VRAM", request.vram or 0) if in_vram else ("RAM", request.ram)
    if in_vram or request.vram is None:
        count = spec.top_k if request.slots is None else min(request.slots, spec.num_experts)
        content = f"dense part, {request.context_text} of context and {count} experts a layer"
    else:
        content = f"{spec.top_k} experts a layer"
    none = (0,) * len(spec.layers)
    return Plan(
        request,
        fits=False,
        mode=None,
        bytes=parts,
        chunk=chunk,
        vram_slots=none,
        ram_slots=none,
        shortfall_bytes=needed - budget,
        reason=f"{request.model} does not fit: {content} need {format_bytes(needed)} of {tier}, "
        f"{format_bytes(needed - budget)} more than the {format_bytes(budget)} there are",
    )
