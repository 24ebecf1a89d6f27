"""The targets of kernels.py's expert kernels, and whether the results reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernel_cases import EXPERT

ISAS = ("avx2", "avx512_vnni", "avx512")
"""Instruction sets that have targets. The portable kernels are meant to be right, not fast."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one ratio, column `figure` of the results' rows, for these activations and tokens."""

    activations: tuple[str, ...]
    tokens: int
    figure: str
    limit: float
    at_least: bool
    kernels: tuple[str, ...] = (EXPERT,)

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def concerns(self, row: dict[str, Any]) -> bool:
        ours = row["kernel"] in self.kernels and row["by"] in ISAS and row["activations"] in self.activations
        return ours and row["tokens"] == self.tokens and row[self.figure] is not None

    def verdict(self, row: dict[str, Any]) -> dict[str, Any]:
        """`holds`: the median over pairs meets the target; `certain`: both ends of its interval agree."""
        figure = row[self.figure]
        holds = self.met_by(figure["median"])
        ends = [] if figure["low"] is None else [figure["low"], figure["high"]]
        return {
            "kernel": row["kernel"],
            "isa": row["by"],
            "activations": row["activations"],
            "tokens": self.tokens,
            "figure": self.figure,
            "target": self.limit,
            "at_least": self.at_least,
            "paired": figure,
            "best": row[f"best_{self.figure}"],
            "holds": holds,
            "certain": bool(ends) and all(self.met_by(end) == holds for end in ends),
        }


TARGETS = (
    Target(("int8",), 1, "share_of_read", 0.9, at_least=True),
    Target(("fp32", "bf16"), 1, "share_of_read", 0.65, at_least=True),
    Target(("fp32", "bf16", "int8"), 16, "times_torch", 1.5, at_least=False),
    Target(
        *(("fp32", "bf16", "int8"), 1, "share_of_nf4", 0.7),
        at_least=True,
        kernels=("q3 expert", "q2 expert"),
    ),
)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdict of each target on each measured row that it concerns."""
    return [target.verdict(row) for target in TARGETS for row in rows if target.concerns(row)]
