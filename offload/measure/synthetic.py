"""Synthetic models: random weights at a published model's true widths, to measure it without a download.

Experts are written directly as NF4, at the disk's speed, and the dense part in bf16. All weights are read
from one table of random numbers, from different places, so they have the right scale and no meaning: routing
is as even as chance, and that is why `--routes` lets a recording choose the experts of such a model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from moe_local.cache.errors import DoesNotFitError, OptionError
from moe_local.cache.files import nearest_folder, write_bytes_atomically
from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.registry import demo_folder
from moe_local.offload.checkpoint.spec import ModelSpec, experts_modules, meta_model, model_spec
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.expert_shard import ShardPlan, ShardWriter, disk_errors
from moe_local.offload.measure.shapes import config_fields, published_layers
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.nf4 import nf4_matrix
from moe_local.offload.quantize.views import segment_view
from moe_local.offload.system.direct_io import page_memory
from moe_local.offload.system.home import moe_local_home
from moe_local.offload.system.progress import Progress

REVISION = "2"
"""Increased when the weights change, so that older files are made again."""

TABLE = (1 << 24) - 3
"""How many random numbers the table has: no multiple of a row, so that two rows read from it differ."""
LEVELS_STD = 0.55
"""Standard deviation of NF4's levels when all are equally frequent."""
DENSE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A synthetic checkpoint, with as much of a `Checkpoint` as loading needs."""

    name: str
    folder: Path
    config: Any
    spec: ModelSpec

    @property
    def experts(self) -> Path:
        """Folder of the expert file."""
        return self.folder / "experts"

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"synthetic {REVISION} {self.name}".encode())

    @property
    def dense_nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in _dense(meta_model(self.config)))

    @property
    def experts_nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.plans())

    def plans(self) -> list[ShardPlan]:
        codec = codec_for("nf4")
        plans = []
        for layer in self.spec.layers:
            layouts = (codec.layout(layer.tensors),) * layer.num_experts
            plans.append(ShardPlan(self.fingerprint, "nf4", layer.index, layer.name, layouts))
        return plans


def describe(name: str, layers: int) -> Synthetic:
    """The synthetic model of this shape with `layers` layers, written yet or not. Raises OptionError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = config_fields(name, layers)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    folder = moe_local_home() / "benchmarks" / "synthetic" / f"{name}-{layers}-layers"
    return Synthetic(f"synthetic {name}, {layers} layers", folder, config, model_spec(config))


def most_layers(name: str, ram: int) -> int:
    """How many layers fit on the disk and, without their experts, into `ram` bytes; at least 1."""
    lowest, highest = 1, published_layers(name)
    root = nearest_folder(moe_local_home())
    while lowest < highest:
        middle = (lowest + highest + 1) // 2
        model = describe(name, middle)
        room = 0.9 * (shutil.disk_usage(root).free + _used(model.folder))
        need = model.dense_nbytes + model.experts_nbytes
        if need <= room and 1.5 * model.dense_nbytes <= ram:
            lowest = middle
        else:
            highest = middle - 1
    return lowest


def make(model: Synthetic, progress: Progress | None = None) -> ExpertFile:
    """Write the expert file of `model`, with dense part and tokenizer beside it; keeps weights already there.

    Raises DoesNotFitError if the disk has no room for it.
    """
    folder, plans = model.folder, model.plans()
    missing = [plan for plan in plans if plan.stored_checksums(model.experts) is None]
    need = sum(plan.nbytes for plan in missing)
    dense = folder / DENSE
    if not dense.exists():
        need += model.dense_nbytes
    with disk_errors(folder):
        model.experts.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if need > free:
        raise DoesNotFitError(
            f"{model.name} needs {format_bytes(need)} in {folder}, which has {format_bytes(free)} free; "
            "give fewer --layers, or set MOE_LOCAL_HOME to a folder on a larger disk"
        )
    table = torch.randn(TABLE, generator=torch.Generator().manual_seed(0))
    if not dense.exists():
        with disk_errors(dense, model.dense_nbytes):
            _write_dense(dense, model, table.to(torch.bfloat16))
    _write_small_files(model)
    noise = table.view(torch.uint8)
    for number, plan in enumerate(missing):
        if progress is not None:
            progress("making", number, len(missing))
        _write_shard(plan, model.experts, noise)
    return ExpertFile.finish(
        model.experts,
        model.name,
        model.spec.model_type,
        plans,
        [plan.stored_checksums(model.experts) or () for plan in plans],
    )


def _write_shard(plan: ShardPlan, folder: Path, noise: torch.Tensor) -> None:
    largest = max(layout.nbytes for layout in plan.layouts)
    buffer = page_memory(largest)
    with ShardWriter(plan, folder) as shard:
        for expert, layout in enumerate(plan.layouts):
            fill_expert(buffer[: layout.nbytes], layout, noise, seed=1000 * plan.layer + expert)
            shard.add(buffer[: layout.nbytes].numpy().data)
        shard.finish()


def fill_expert(out: torch.Tensor, layout: Layout, noise: torch.Tensor, seed: int) -> None:
    """Write an expert of random NF4 weights to `out`, uint8 [layout.nbytes].

    Each matrix's output has the scale of its input. `noise`: random bytes, read from a place that depends on
    `seed`.
    """
    _copy_around(out, noise, start=(seed * 7919 * 4096) % noise.numel())
    for tensor in layout.tensors:
        if len(tensor.shape) < 2:
            for segment in layout.parts(tensor.name):
                segment_view(out, segment).zero_()
            continue
        matrix = nf4_matrix(out, layout, tensor.name)
        # Half of the blocks are negated. Levels are not even around zero, and neither are these bytes: by the
        # sum of a row all tokens would soon have nearly the same state, and be given to the same experts.
        matrix.absmax.copy_((matrix.absmax & 1) * 255)  # about -1 and 1 in bitsandbytes' map
        matrix.offset.zero_()
        matrix.absmax_scale.fill_(1 / (LEVELS_STD * math.sqrt(tensor.shape[-1])))


def _copy_around(out: torch.Tensor, table: torch.Tensor, start: int) -> None:
    """Fill `out` from `table`, beginning at `start` and wrapping around."""
    done = 0
    while done < out.numel():
        count = min(out.numel() - done, table.numel() - start)
        out[done : done + count] = table[start : start + count]
        done, start = done + count, 0


def _dense(model: Any) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, bytes in bf16) of every weight and persistent buffer outside the routed experts."""
    experts = {f"{name}." for name, _ in experts_modules(model)}
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(prefix) for prefix in experts):
            yield name, tuple(tensor.shape), 2 * tensor.numel()


def _write_dense(path: Path, model: Synthetic, table: torch.Tensor) -> None:
    tensors = list(_dense(meta_model(model.config)))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, nbytes in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(raw).to_bytes(8, "little") + raw
        for number, (name, shape, _) in enumerate(tensors):
            for piece in _weights(name, shape, table, start=(number * 7919 * 4096) % TABLE):
                yield piece.view(torch.uint8).numpy().tobytes()

    write_bytes_atomically(path, pieces())


def _weights(name: str, shape: Sequence[int], table: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
    """A weight in bf16 pieces: matrices keep the scale of their input, norms are ones, other vectors 0."""
    numel = math.prod(shape)
    if len(shape) < 2:
        yield torch.full((numel,), 1.0 if "norm" in name else 0.0, dtype=torch.bfloat16)
        return
    gain = 3.0 if any(part in name for part in ("gate.weight", "router", "lm_head")) else 1.0
    scale = 1.0 if "embed" in name else gain / math.sqrt(shape[-1])
    done = 0
    while done < numel:
        count = min(numel - done, TABLE - start)
        yield table[start : start + count] * scale
        done, start = done + count, 0


def _write_small_files(model: Synthetic) -> None:
    """Write configs, and the demo's tokenizer, whose ids all of these models have."""
    config = model.config.to_dict() | {"architectures": [model.spec.architecture]}
    files = {"config.json": json.dumps(config, indent=2).encode()}
    files["generation_config.json"] = json.dumps({"bos_token_id": 1, "pad_token_id": 0}).encode()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        files[name] = (demo_folder() / name).read_bytes()
    with disk_errors(model.folder):
        for name, content in files.items():
            write_bytes_atomically(model.folder / name, [content])


def _used(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_format(experts: str) -> None:
    """Raise OptionError for a format in which synthetic experts cannot be made."""
    if experts != "nf4":
        raise OptionError(f"made experts are nf4 only; leave out --experts {experts}")
