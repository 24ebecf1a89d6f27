"""`bench --plot`: time per token by cause, hit rate by layer, and which experts were used, as a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cache.files import write_bytes_atomically

KINDS = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps", "svgz")
"""The file types that matplotlib can write by itself; asking matplotlib for them takes seconds."""

# Paul Tol's "bright" scheme, which colour-blind readers can tell apart.
COLOURS = {
    "other": "#BBBBBB",
    "demand": "#EE6677",
    "late_prefetch": "#CCBB44",
    "disk": "#AA3377",
    "cpu": "#66CCEE",
    "sync": "#4477AA",
}


def check_plotting(path: Path) -> None:
    """Raise MoeLocalError if matplotlib is not installed, OptionError if it cannot write this file type."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MoeLocalError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if _kind(path) not in KINDS:
        raise OptionError(f"--plot cannot draw {path}; end its name in .{', .'.join(KINDS)}")


def _kind(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def draw_picture(document: Mapping[str, Any], path: Path) -> None:
    """Draw the figures of `bench` into a file of the type that its suffix names, written atomically.

    Raises OSError if it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    time, hits, use = figure.subplots(3, 1, height_ratios=(3, 2, 3))
    figure.suptitle(f"{document['model']}: {document['workload']}")
    _draw_time(time, document)
    if "hit_rate" in document:  # missing if a Ctrl-C came before
        _draw_hits(hits, document["hit_rate"])
    _draw_use(figure, use, document["experts_used"])
    picture = io.BytesIO()
    figure.savefig(picture, format=_kind(path), dpi=100)
    write_bytes_atomically(path, [picture.getvalue()])


def _draw_time(axes: Any, document: Mapping[str, Any]) -> None:
    """One bar for each decode step of the last timed run."""
    runs: Sequence[Sequence[Mapping[str, Any]]] = document["runs"]
    steps = runs[-1] if runs else []
    places = range(1, len(steps) + 1)
    below = [0.0] * len(steps)
    for cause in COLOURS:
        heights = [_part(step, cause) for step in steps]
        if any(heights):
            axes.bar(places, heights, 1.0, below, color=COLOURS[cause], label=cause.replace("_", " "))
            below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.axhline(document["floor"]["ms_per_token"], color="black", ls="--", lw=1, label="floor")
    axes.set(title="Time of each token by cause", xlabel="token", ylabel="ms", xlim=(0.5, len(steps) + 0.5))
    axes.margins(y=0.2)
    axes.legend(loc="upper right", ncols=4)


def _part(step: Mapping[str, Any], cause: str) -> float:
    stalls: Mapping[str, float] = step["stall_ms"]
    return max(0.0, step["ms"] - sum(stalls.values())) if cause == "other" else stalls.get(cause, 0.0)


def _draw_hits(axes: Any, rates: Mapping[str, Any]) -> None:
    by_layer = [0.0 if rate is None else 100 * rate for rate in rates["by_layer"]]
    axes.bar(range(len(by_layer)), by_layer, color="#228833")
    for name, style in (("cold", "--"), ("steady", "-")):
        if rates[name] is not None:
            axes.axhline(100 * rates[name], color="black", ls=style, lw=1, label=f"{name}, all layers")
    axes.set(title="Hit rate by layer, from an empty cache", xlabel="MoE layer", ylabel="%", ylim=(0, 100))
    axes.legend(loc="lower right")


def _draw_use(figure: Any, axes: Any, used: Sequence[Sequence[int]]) -> None:
    """Each expert's share of all choices in its layer."""
    widest = max(map(len, used), default=1)
    shares = [[count / max(1, sum(row)) for count in row] + [0.0] * (widest - len(row)) for row in used]
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.set(title="Share of each layer's choices by expert", xlabel="expert", ylabel="MoE layer")
    figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.0f} %")
