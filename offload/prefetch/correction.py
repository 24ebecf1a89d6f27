"""What a router's input will be like some layers on, as far as that can be told from what it would be now.

A later router, asked about today's residual, does not know what the layers between will add to it. Part of
that is the same for all tokens, part a linear function of the state; a low-rank matrix and a bias, fitted
from recorded states (`fit`), supply both. It works on the router's input, not its logits, so that whatever
a router does with its logits (groups, sigmoids, biases, normalizing) stays its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe_local.cache.errors import ExpertFileError, first_line
from moe_local.cache.files import parse_json, write_bytes_atomically

FILE_NAME = "predictor.safetensors"
VERSION = "1"
REMEDY = "write it again: moe-local calibrate MODEL"


@dataclass(frozen=True, slots=True)
class Correction:
    """x -> x + (x @ down) @ up + bias, for one layer and one distance; all in x's dtype, on its device."""

    down: torch.Tensor
    """[D, r]"""
    up: torch.Tensor
    """[r, D]"""
    bias: torch.Tensor
    """[D]"""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, D], a new tensor."""
        return torch.addmm(self.bias + x, x @ self.down, self.up)

    def to(self, like: torch.Tensor) -> Correction:
        """In the dtype and on the device of `like`."""
        return Correction(self.down.to(like), self.up.to(like), self.bias.to(like))


Corrections = Mapping[tuple[int, int], Correction]
"""By (layer whose residual is at hand, layers ahead)."""


def fit(
    x: torch.Tensor, later: torch.Tensor, weight: torch.Tensor, rank: int, ridges: Sequence[float]
) -> list[Correction]:
    """The corrections that bring `x` nearest to `later` as a router with this weight sees them, by ridge.

    `x` [N, D] is what the router would read now, `later` [N, D] what it read in the end, `weight` [E, D] its
    matrix. Ridge regression of the logits' differences on centred x, each ridge in units of x's mean
    variance; of its [D, E] matrix the `rank` largest singular directions of the predictions are kept. Solved
    over tokens or over D, whichever are fewer. The change of x is the smallest that changes the logits so.
    """
    x, weight = x.float(), weight.float().to(x.device)
    gap = (later.float() - x) @ weight.T
    mean_x, mean_gap = x.mean(0), gap.mean(0)
    centred, target = x - mean_x, gap - mean_gap
    tokens, width = centred.shape
    few = tokens < width
    gram = (centred @ centred.T if few else centred.T @ centred).double()
    right = (target if few else centred.T @ target).double()
    unit = float(centred.square().sum()) / width
    back = torch.linalg.pinv(weight).T  # [E, D], logits to the smallest input that makes them
    found = []
    for ridge in ridges:
        damped = gram.clone()
        damped.diagonal().add_(ridge * unit)
        solution = torch.linalg.solve(damped, right).float()
        if few:
            solution = centred.T @ solution
        _, _, directions = torch.linalg.svd(centred @ solution, full_matrices=False)
        kept = directions[: min(rank, directions.shape[0])]
        down = solution @ kept.T
        bias = (mean_gap - mean_x @ down @ kept) @ back
        found.append(Correction(down.contiguous(), (kept @ back).contiguous(), bias))
    return found


def write_corrections(folder: Path, corrections: Corrections, fingerprint: str) -> Path:
    """Keep them beside the expert file in `folder`, atomically. Raises OSError."""
    tensors = {
        f"{layer}.{distance}.{name}": getattr(correction, name).cpu().contiguous()
        for (layer, distance), correction in corrections.items()
        for name in ("down", "up", "bias")
    }
    keys = json.dumps(sorted(corrections))
    content = save(tensors, {"version": VERSION, "fingerprint": fingerprint, "keys": keys})
    target = folder / FILE_NAME
    write_bytes_atomically(target, [content])
    return target


def read_corrections(folder: Path, fingerprint: str) -> dict[tuple[int, int], Correction] | None:
    """Those kept in `folder`; None where none were.

    Raises ExpertFileError for a file that is damaged or was made for another checkpoint.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("fingerprint") != fingerprint or about.get("version") != VERSION:
                raise ExpertFileError(
                    f"{path} was made for another checkpoint or by another version; {REMEDY}"
                )
            return {
                (layer, distance): Correction(
                    *(file.get_tensor(f"{layer}.{distance}.{name}") for name in ("down", "up", "bias"))
                )
                for layer, distance in parse_json(about["keys"])
            }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ExpertFileError(f"{path} cannot be read ({first_line(error)}); {REMEDY}") from None
