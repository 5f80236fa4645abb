"""Pictures of a comparison, one for every axis, as SVG and PNG: they stay legible in print and without colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ramulus.look.compare.compare import Axis, Comparison, Estimate, estimate
from ramulus.look.curves import AXES, Curve
from ramulus.look.terminal import unbroken

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#B8860B",
    "#000000",
)  # Okabe and Ito's, told apart by the color-blind
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p", "d")
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
BANDS, BARS = (
    4,
    8,
)  # the most labels whose intervals are shaded, or drawn as bars: more hide one another; the right half has them all
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ramulus",  # the same comparison makes the same file
}


def draw_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Write equal-AXIS.svg and .png for every axis; returns their paths."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "ramulus[plots]"') from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for axis in comparison.axes:
        with matplotlib.rc_context(_STYLE):
            count = len(comparison.groups)
            figure = Figure(figsize=(9.0, max(3.4, 1.6 + 0.26 * count)), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(3, 2))
            draw_curves(left, comparison, axis)
            draw_ends(right, comparison, axis)
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = folder / f"equal-{axis.name}.{kind}"
                figure.savefig(path, dpi=200, metadata=metadata)
                written.append(path)
    return written


def draw_curves(axes: Any, comparison: Comparison, axis: Axis) -> None:
    """The mean over seeds at every step that all of a label's seeds were measured at, over the mean of what they had spent."""
    count = len(comparison.groups)
    for i, (label, curves) in enumerate(comparison.groups.items()):
        x, estimates = points(curves, axis.name)
        y = [point.mean for point in estimates]
        half = [point.half or 0.0 for point in estimates]
        axes.plot(x, y, label=_plain(label), **look(i), linewidth=1.6, markersize=5)
        if any(half) and count <= BANDS:
            low, high = ([a + sign * b for a, b in zip(y, half)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=COLORS[i % len(COLORS)], alpha=0.15, linewidth=0)
        elif any(half) and count <= BARS:
            axes.errorbar(
                x, y, yerr=half, fmt="none", ecolor=COLORS[i % len(COLORS)], elinewidth=0.8, capsize=2.5, alpha=0.7
            )
    axes.axvline(axis.budgets[-1].amount, color="#777777", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel(f"{AXES[axis.name]} (the dotted line: reached by all)")
    axes.set_ylabel(_plain(comparison.metric))
    axes.set_xlim(left=0)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def draw_ends(axes: Any, comparison: Comparison, axis: Axis) -> None:
    """The means at the equal budget with their intervals, a row for each label, which is also the legend."""
    budget = axis.budgets[-1]
    for i, place in enumerate(budget.places):
        style = look(i) | {"linestyle": "none"}
        if place.estimate is not None:
            axes.errorbar(
                place.estimate.mean, i, xerr=place.estimate.half, **style, markersize=6, capsize=3, elinewidth=1.2
            )
        else:
            axes.annotate("no value yet", (0.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(budget.places)), [_plain(place.label) for place in budget.places])
    axes.set_ylim(len(budget.places) - 0.5, -0.5)
    axes.set_xlabel(f"{_plain(comparison.metric)} at {_short(budget.amount)} {AXES[axis.name]}")
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)


def points(curves: Sequence[Curve], axis: str) -> tuple[list[float], list[Estimate]]:
    """(mean cost, mean value with its interval) at every step at which all curves have a value."""
    where = [{step: i for i, step in enumerate(curve.steps)} for curve in curves]
    steps = [step for step in curves[0].steps if all(step in at for at in where)]
    x = [fmean([curve.costs[axis][at[step]] for curve, at in zip(curves, where)]) for step in steps]
    return x, [estimate([curve.values[at[step]] for curve, at in zip(curves, where)]) for step in steps]


def look(i: int) -> dict[str, Any]:
    """Color, marker and line of the i-th label: labels that share one of them differ in the others."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)]}


def _short(value: float) -> str:
    """A number of three digits with k, M or G behind it: 1200000 as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _plain(text: str) -> str:
    """Text in which matplotlib sees no mathematics, on one line."""
    return unbroken(text).replace("$", r"\$")
