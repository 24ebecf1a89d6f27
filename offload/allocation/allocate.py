"""Chooses a format for each expert of a model, a Mix: the entry point of this package."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_local.cache.files import locked
from moe_local.offload.allocation.expected import candidates
from moe_local.offload.allocation.knapsack import Choice, Option, solve
from moe_local.offload.allocation.measure import Measurement
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.allocation.sensitivity import Sensitivity, unwritable
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.options import LoadOptions
from moe_local.offload.quantize.mix import Mix, check_bits, even_mix, layout_of
from moe_local.offload.system.home import expert_file_folder, moe_local_home
from moe_local.offload.system.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A Mix, and its expected harm to the model."""

    mix: Mix
    bits: float
    """Average bits a weight, all bytes counted; at most what was asked for."""
    harm: float
    """Expected harm, in the unit of its Sensitivity."""
    even_harm: float
    """Expected harm of as many bytes given out evenly, in the two formats nearest to these bits."""
    gap: float
    """Largest share of `harm` (with the cost of misses, if that was considered) that another could save."""
    text: str | None
    """Name of the text that was read, so that harm is in nats a token; None if there was none."""


def allocate(
    checkpoint: Checkpoint,
    experts: str,
    *,
    misses: MissCost | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """The best mix of this checkpoint for a canonical `experts="mixed:BITS"`.

    It is chosen by a measurement on a text, if there was one (see allocation.text), else by one on the
    weights alone, which is made now; either is stored below MOE_LOCAL_HOME. The same files give the same mix.
    With `misses` the time to fetch experts that are not resident is considered, too. Raises OptionError for
    bits that no formats give, CheckpointError for weights that cannot be read or encoded.
    """
    check_mixed(experts, checkpoint.spec, checkpoint.name)
    sensitivity = sensitivity_of(checkpoint, progress=progress)
    return best_mix(experts, checkpoint.spec, sensitivity, misses, checkpoint.name)


def check_mixed(experts: str, spec: ModelSpec, model: str) -> None:
    """Raises OptionError unless the candidate formats can give the bits that "mixed:BITS" asks for."""
    check_bits(experts, spec, model, candidates(spec.dtype))


def best_mix(
    experts: str,
    spec: ModelSpec,
    sensitivity: Sensitivity,
    misses: MissCost | None = None,
    model: str = "this model",
) -> Allocation:
    """The assignment of least expected harm within the bits that `experts`, "mixed:BITS", asks for.

    Raises OptionError for bits that the measured formats do not give.
    """
    formats = list(sensitivity.layers[0].errors)
    bits = check_bits(experts, spec, model, formats)
    room = int(bits * spec.expert_numel / 8)
    bytes_cost = [misses.costs(sensitivity, layer.index) if misses else None for layer in spec.layers]
    places = [(layer, expert) for layer in spec.layers for expert in range(layer.num_experts)]
    items = [
        [
            Option(
                nbytes := layout_of(name, layer.tensors).nbytes,
                sensitivity.harm(layer.index, expert, name)
                + (nbytes * per_byte[expert] if (per_byte := bytes_cost[layer.index]) else 0.0),
            )
            for name in formats
        ]
        for layer, expert in places
    ]
    solved = solve(items, room)
    uniform = _uniform(items, room, solved.bound)
    choice = min((solved, *uniform), key=lambda found: (found.cost, found.nbytes))
    rows: list[list[str]] = [[] for _ in spec.layers]
    for (layer, _), picked in zip(places, choice.picked, strict=True):
        rows[layer.index].append(formats[picked])
    mix = Mix(experts, tuple(map(tuple, rows)))
    even = even_mix(experts, spec, formats)
    return Allocation(
        mix,
        mix.bits(spec),
        sensitivity.expected(mix.formats),
        sensitivity.expected(even.formats),
        choice.gap,
        sensitivity.text,
    )


def _uniform(items: Sequence[Sequence[Option]], room: int, bound: float) -> list[Choice]:
    """All experts in one format, for each that has room: an approximate solution may be worse than these."""
    found = []
    for number in range(len(items[0])):
        picked = [options[number] for options in items]
        nbytes = sum(option.nbytes for option in picked)
        if nbytes <= room:
            cost = math.fsum(option.cost for option in picked)
            found.append(Choice((number,) * len(items), nbytes, cost, min(bound, cost)))
    return found


def sensitivity_of(checkpoint: Checkpoint, *, progress: Progress | None = None) -> Sensitivity:
    """The stored Sensitivity of this checkpoint, or else one measured now on the weights alone, and stored.

    Waits for another process that measures it. Raises CheckpointError for weights that cannot be read or
    encoded, ExpertFileError if nothing can be stored.
    """
    path = sensitivity_path(checkpoint)
    formats = candidates(checkpoint.spec.dtype)

    def kept() -> Sensitivity | None:
        found = Sensitivity.read(path, checkpoint.fingerprint)
        if found is None or not found.is_of(checkpoint.spec):
            return None
        return found if found.text is not None or found.measured(formats) else None

    if (found := kept()) is not None:
        return found
    with measuring(checkpoint):
        if (found := kept()) is not None:  # stored by the process that was waited for
            return found
        measurement = Measurement(checkpoint, formats, None, partial_path(path), compute_device(), progress)
        return measured(checkpoint, measurement)


@contextmanager
def measuring(checkpoint: Checkpoint) -> Iterator[None]:
    """A lock for measuring a checkpoint; logs once if it waits, after which another result may be stored.

    Raises ExpertFileError if nothing can be stored below MOE_LOCAL_HOME. The holder may convert to a single
    format, never to a mix: choosing a mix takes this lock while the mix's folder is locked.
    """

    def waiting() -> None:
        logger.warning("waiting for another process that measures %s", checkpoint.name)

    path = sensitivity_path(checkpoint)
    with ExitStack() as held:
        with unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path, waiting=waiting))
        yield


def measured(checkpoint: Checkpoint, measurement: Measurement) -> Sensitivity:
    """Run the measurement and store its result."""
    found = measurement.run()
    found.save(sensitivity_path(checkpoint))
    return found


def sensitivity_path(checkpoint: Checkpoint) -> Path:
    """The file in which a checkpoint's Sensitivity is stored, beside its expert files."""
    return kept_path(checkpoint.name, checkpoint.fingerprint)


def kept_path(model: str, fingerprint: str) -> Path:
    """The same for a checkpoint with this name and fingerprint."""
    folder = expert_file_folder(moe_local_home(), model, "", fingerprint)
    return folder.with_name(f"sensitivity-{fingerprint[:16]}.json")


def partial_path(path: Path) -> Path:
    """The file in which an unfinished measurement is stored."""
    return path.with_suffix(".partial.json")


def compute_device() -> torch.device:
    """The device on which formats are tried: the GPU if there is one."""
    return LoadOptions().torch_device()
