"""Corrections that predict a later router's input from the current residual.

A later router that reads the current residual lacks what the layers between will add to it. Part of that is
the same for all tokens, and part is a linear function of the state; a bias and a low-rank matrix, fitted to
recorded states (`fit`), supply these parts. The correction applies to the router's input and not to its
logits, so that the router's own treatment of logits (groups, sigmoids, biases, normalizing) stays as it is.
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
        """This correction in the dtype and on the device of `like`."""
        return Correction(self.down.to(like), self.up.to(like), self.bias.to(like))


Corrections = Mapping[tuple[int, int], Correction]
"""The key is (layer whose residual is known, layers ahead)."""


def fit(
    x: torch.Tensor, later: torch.Tensor, weight: torch.Tensor, rank: int, ridges: Sequence[float]
) -> list[Correction]:
    """One correction for each of `ridges`, fitted to give the router the logits of `later` when it reads `x`.

    `x` [N, D] is what the router would read now, `later` [N, D] what it actually read, `weight` [E, D] its
    matrix. The fit is a ridge regression of the logits' differences on centred x, each ridge in units of x's
    mean variance; of its [D, E] solution the `rank` largest singular directions of the predictions are kept.
    The system is solved over tokens or over D, whichever is smaller. Of the changes of x that change the
    logits in this way, the correction makes the smallest.
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
    back = torch.linalg.pinv(weight).T  # [E, D], from logits to the smallest input that gives them
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
    """Write the corrections atomically beside the expert file in `folder`. Raises OSError."""
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
    """The corrections that were written to `folder`; None if there are none.

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
