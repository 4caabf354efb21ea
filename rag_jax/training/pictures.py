"""The report's plots of evaluated rows as pictures, for TensorBoard's page of images. Needs matplotlib."""

import dataclasses
import importlib
import importlib.util
import io
import math
import pathlib
from typing import Any

from rag_jax.errors import UserError
from rag_jax.report import collect

DPI = 100
SIDE = 4.2  # inches, of each plot of a picture
# Colours as the page has them: one a side, or one for queries and one for passages.
COLORS = ("#0b62a8", "#c2570c")


@dataclasses.dataclass(frozen=True)
class Picture:
    png: bytes
    width: int  # pixels
    height: int


def pictures(workdir: pathlib.Path, step: int) -> dict[str, Picture]:
    """By name, of what a run's evaluations up to `step` have left in its folder; none where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    try:
        run = collect.read(workdir)
    except UserError:  # a file that cannot be read stops no training; the report, at its end, names it
        return {}
    run = dataclasses.replace(run, evaluations=[one for one in run.evaluations if one["step"] <= step])
    sides = collect.evaluated(run)
    drawn: dict[str, Picture | None] = {
        "weight_and_right": _calibration(collect.calibration(run, sides)),
        "neighbours_kept": _kept(collect.kept_neighbours(sides)),
        "plane": _plane(collect.plane(sides)),
    }
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _calibration(sides: dict[str, collect.Points]) -> Picture | None:
    """How often the passage weighed most is right, by its weight; on the diagonal, as often as its weight says."""
    sides = {name: points for name, points in sides.items() if points}
    if not sides:
        return None
    figure, (axes,) = _figure(1)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for (name, points), color in zip(sides.items(), COLORS, strict=False):
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=color, label=name)
    axes.set(xlabel="p(k | query)", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return _png(figure)


def _kept(kept: dict[str, Any] | None) -> Picture | None:
    """How many queries have kept which share of their nearest passages."""
    if kept is None or kept["mean"] is None:
        return None
    figure, (axes,) = _figure(1)
    shares = [i / 10 for i in range(len(kept["histogram"]))]
    axes.bar(shares, kept["histogram"], width=0.08, color=COLORS[0])
    axes.set(xlabel="share of the nearest passages kept by training", ylabel="queries")
    return _png(figure)


def _plane(sides: dict[str, Any]) -> Picture | None:
    """Queries and the passages of their rows, each pair joined by a line, before and after on the same axes."""
    if not sides:
        return None
    figure, both = _figure(2)
    most = 1.05 * max((abs(v) for side in ("before", "after") for point in sides[side] for v in point), default=1) or 1
    for axes, side in zip(both, ("before", "after"), strict=True):
        x0, y0, x1, y1 = zip(*sides[side], strict=True)
        gap = [math.nan] * len(x0)  # between one pair's line and the next: all are one curve, which is quick
        joined = ([v for ends in zip(*of, gap, strict=True) for v in ends] for of in ((x0, x1), (y0, y1)))
        axes.plot(*joined, color="0.85", linewidth=0.7, zorder=1)
        for x, y, color, label in ((x0, y0, COLORS[0], "queries"), (x1, y1, COLORS[1], "passages of their rows")):
            axes.scatter(x, y, s=7, color=color, label=label, zorder=2)
        axes.set(title=side, xlim=(-most, most), ylim=(-most, most), xticks=[], yticks=[], aspect="equal")
    both[-1].legend(loc="upper right", fontsize="small")
    return _png(figure)


def _figure(count: int) -> tuple[Any, Any]:
    """One whose plots lie side by side; without pyplot, which would keep it and may open windows."""
    figure_module = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(SIDE * count, SIDE), dpi=DPI, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _png(figure: Any) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    width, height = figure.canvas.get_width_height()
    return Picture(file.getvalue(), width, height)
