"""Figures of a converted mix: its formats, and their expected harm to the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.allocation.allocate import best_mix, kept_path
from moe_local.offload.allocation.sensitivity import Sensitivity
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.expert_file.expert_file import ExpertFile


@dataclass(frozen=True, slots=True)
class MixFigures:
    """Figures of one mix. The last four are None if the Sensitivity that it was chosen by is not stored."""

    bits: float
    """Average bits per weight, all bytes counted."""
    formats: dict[str, int]
    """How many experts have each format."""
    text: bool | None = None
    """Whether a text was read, so that harm is in nats a token; else it is a share of the experts' output."""
    harm: float | None = None
    even_harm: float | None = None
    """Expected harm of as many bytes given out evenly."""
    gap: float | None = None
    """Largest share of `harm` that a better mix could save."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures in words."""
        counts = ", ".join(f"{count} in {name}" for name, count in self.formats.items())
        found = [f"{self.bits:.3f} bits a weight: {counts}"]
        if self.harm is not None and self.even_harm and self.gap is not None:
            what = f"KL divergence {self.harm:.4f} nats a token"
            if not self.text:
                what = f"error {100 * self.harm:.2f} % of the experts' output, by the weights alone"
            found.append(
                f"expected {what}: {100 * self.harm / self.even_harm:.0f} % of what as many bytes dealt out "
                f"evenly cost, and within {100 * self.gap:.1f} % of the least possible"
            )
        return found


def mix_figures(spec: ModelSpec, file: ExpertFile) -> MixFigures:
    """The figures of a converted mix of a model of this shape."""
    mix = file.mix
    bits, counts = mix.bits(spec), mix.counts()
    sensitivity = Sensitivity.read(kept_path(file.name, file.fingerprint), file.fingerprint)
    if sensitivity is None or not (sensitivity.is_of(spec) and sensitivity.measured(list(counts))):
        return MixFigures(bits, counts)
    try:
        best = best_mix(mix.name, spec, sensitivity)
    except OptionError:  # the Sensitivity was measured again since then, with other formats
        return MixFigures(bits, counts)
    harm = sensitivity.expected(mix.formats)
    least = best.harm * (1 - best.gap)
    gap = max(0.0, 1 - least / harm) if harm else 0.0
    return MixFigures(bits, counts, sensitivity.text is not None, harm, best.even_harm, gap)
