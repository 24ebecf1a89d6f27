"""The floor, a physical bound of a token's time: its bytes over bandwidths measured in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_local.cache.stats import BytesMoved
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.plan.estimate import read_per_token
from moe_local.offload.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that one decoded token reads, without the one row of the input embedding."""

    expert_bytes: int
    """Bytes of the experts that a token is routed to, over all layers."""
    expert_numel: int
    dense_bytes: int
    dense_numel: int

    @property
    def nbytes(self) -> int:
        return self.expert_bytes + self.dense_bytes

    def bits(self) -> dict[str, float]:
        """Bits per weight, scales included."""
        return {
            "all": 8 * self.nbytes / (self.expert_numel + self.dense_numel),
            "experts": 8 * self.expert_bytes / self.expert_numel,
            "dense": 8 * self.dense_bytes / self.dense_numel,
        }


def planned_weights(plan: Plan, top_k: int | None = None) -> Weights:
    """The weights by the plan's sizes; `top_k` experts per layer, if given, instead of the model's."""
    spec, dense = plan.request.spec, plan.bytes.dense
    tables = [tensor for tensor in spec.dense if tensor.shape == (spec.vocab_size, spec.hidden_size)]
    looked_up = tables[0].numel if len(tables) > 1 else 0
    sizes = plan.request.expected_sizes
    used = [top_k or layer.top_k for layer in spec.layers]
    return Weights(
        expert_bytes=round(sum(count * size for count, size in zip(used, sizes, strict=True))),
        expert_numel=sum(n * layer.expert_numel for n, layer in zip(used, spec.layers, strict=True)),
        dense_bytes=read_per_token(spec, dense, 0, plan.request.context, plan.request.dtype.itemsize),
        dense_numel=spec.dense_numel - looked_up,
    )


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a decoded token: every weight that it uses is read once from the fastest tier.

    The cost of misses depends on what was in the cache; `with_misses` takes it from the counts of a run.
    """

    weights: Weights
    tier: str
    """The fastest tier: "vram" or "ram"."""
    bandwidths: Bandwidths

    @classmethod
    def of(cls, plan: Plan, bandwidths: Bandwidths, top_k: int | None = None) -> Floor:
        tier = "ram" if plan.request.vram is None else "vram"
        return cls(planned_weights(plan, top_k), tier, bandwidths)

    @property
    def bytes_per_s(self) -> float:
        return float(getattr(self.bandwidths, self.tier))

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.weights.nbytes / self.bytes_per_s

    def with_misses(self, moved: BytesMoved, from_storage: float = 1.0) -> float:
        """The least milliseconds of a token that also moved these bytes: the time of the slowest link.

        All links and tiers may work at once, so this is a floor for any prefetch, too. `from_storage`: the
        share of `moved.disk` that came from the disk; the rest was in the page cache, as fast as RAM.
        """
        h2d = moved.h2d / self.bandwidths.h2d
        disk = moved.disk * from_storage / self.bandwidths.disk
        return max(self.ms_per_token, 1000 * h2d, 1000 * disk)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "ms_per_token": self.ms_per_token,
            "tier": self.tier,
            "bytes_per_s": self.bytes_per_s,
            "bytes_per_token": {"experts": self.weights.expert_bytes, "dense": self.weights.dense_bytes},
            "bits_per_weight": self.weights.bits(),
            "weights": asdict(self.weights),
        }
