"""Runs side by side over seeds: means with intervals at equal budgets, and paired differences that say when they are within noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from statistics import fmean

from ramulus.look.curves import AXES, Curve, find_runs, read_curve, refuse_unknown

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
SHARE = 0.95  # of the intervals
Groups = Mapping[str, Sequence[Curve]]
HIGHER, LOWER, NOISE = "higher", "lower", "within noise"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t interval, which fewer than two seeds do not have."""

    n: int
    mean: float
    half: float | None  # half the width of the interval


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over the seeds that both have."""

    pairs: int
    estimate: Estimate | None  # None where no seed is in both
    sure: bool = True  # whether the verdict holds anywhere between the measurements before and after the budget

    @property
    def verdict(self) -> str:
        """What can be said: higher, lower, within noise, or why nothing can be."""
        words = direction(self.estimate)
        return words if self.sure or words == NOISE else f"{words} (unsure)"


@dataclass(frozen=True)
class Place:
    """Where one label stands at one budget; without values unless every seed has one by then."""

    label: str
    values: dict[int, float] = field(default_factory=dict)  # seed -> last value at or before the budget
    later: dict[int, float] = field(
        default_factory=dict
    )  # seed -> the value after that one; the same if measured at the budget
    measured: float | None = None  # share of the budget that had been spent at `values`, mean over seeds
    next_at: float | None = None  # the same at `later`; None where all were measured at the budget, or not after it
    estimate: Estimate | None = None
    difference: Difference | None = None  # against the baseline; None for itself and where a value lacks


@dataclass(frozen=True)
class Budget:
    """All labels at one equal budget."""

    fraction: float
    amount: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Axis:
    """All labels at equal amounts of one thing."""

    name: str
    limit: str  # the run that reaches no further
    budgets: tuple[Budget, ...]  # by growing fraction of the largest amount that every run reaches


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side."""

    metric: str
    baseline: str | None  # None where there is one label only
    groups: dict[str, tuple[Curve, ...]]
    axes: tuple[Axis, ...]
    notes: tuple[str, ...]
    slack: float = 0.0


def compare(
    paths: Sequence[Path], metric: str = "eval/mean", baseline: str | None = None, fractions: Sequence[float] = FRACTIONS,
    finished: bool = False, slack: float = 0.0,
) -> Comparison:  # fmt: skip
    """Compare the runs in some folders; `finished` leaves out those that are not. The baseline is the first label where none is named.

    The value at a budget is the last one measured at or before it, or up to the share `slack` of it after it; nothing is interpolated.
    Raises ValueError for a metric or baseline that is not there, and where nothing is left to compare.
    """
    if not paths:
        raise ValueError("name the folder of a run or of a sweep: ramulus compare runs/three")
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must be above 0 and at most 1, got {' '.join(map(str, fractions)) or 'none'}")
    if not 0 <= slack < 1:
        raise ValueError(f"slack is a share of the budget from 0 to below 1, got {slack}")
    runs = find_runs(paths)
    curves = [read_curve(run, metric) for run in runs]
    if metric == "eval/mean" and not any(curve.values for curve in curves):  # rewards that call nothing correct
        scaled = [read_curve(run, "eval/reward") for run in runs]
        metric, curves = ("eval/reward", scaled) if any(curve.values for curve in scaled) else (metric, curves)
    if not any(curve.values for curve in curves):
        refuse_unknown(runs, metric)
    kept, notes = _choose(curves, metric, finished)
    groups = {label: tuple(same) for label, same in groupby(kept, key=lambda curve: curve.run.label)}
    if baseline is not None and baseline not in groups:
        raise ValueError(f"there is no {baseline!r} to compare with: the labels are {', '.join(groups)}")
    chosen = (baseline or next(iter(groups))) if len(groups) > 1 else None
    notes += seed_notes(groups)
    axes = []
    for name in AXES:
        lacking = [curve.run.name for curve in kept if name not in curve.totals]
        empty = [curve.run.label for curve in kept if curve.totals.get(name) == 0]
        if lacking and len(lacking) < len(kept):
            notes.append(f"not at equal {AXES[name]}: not in the metrics of {some(lacking)}")
        elif empty:
            notes.append(f"not at equal {AXES[name]}: {some(empty)} had none")
        elif not lacking:
            axes.append(_along(name, groups, sorted(set(fractions)), chosen, slack))
    return Comparison(metric, chosen, groups, tuple(axes), tuple(notes), slack)


def _choose(curves: Sequence[Curve], metric: str, finished: bool) -> tuple[list[Curve], list[str]]:
    """The curves that are compared, those of one label together, and what is to be said about the others."""
    notes = []
    undone = [curve.run.name for curve in curves if not curve.run.finished]
    if undone:
        left = "left out" if finished else "they lower the budgets that all reach; --finished leaves them out"
        notes.append(f"not finished: {some(undone)} ({left})")
    used = [curve for curve in curves if curve.run.finished or not finished]
    silent = [curve.run.name for curve in used if not curve.values]
    if silent:
        notes.append(f"left out, without {metric} so far: {some(silent)}")
    used = [curve for curve in used if curve.values]
    if not used:
        raise ValueError(f"no run is left to compare: {'; '.join(notes)}")
    order = {label: i for i, label in enumerate(dict.fromkeys(curve.run.label for curve in used))}
    return sorted(used, key=lambda curve: (order[curve.run.label], curve.run.seed)), notes


def seed_notes(groups: Groups) -> list[str]:
    """What to say where labels have other seeds than others, or one only. ValueError where a label has a seed twice."""
    seeds = {label: [curve.run.seed for curve in curves] for label, curves in groups.items()}
    for label, own in seeds.items():
        if len(set(own)) < len(own):
            raise ValueError(f"{label} has a seed twice: {own}; give each run once")
    notes = []
    if len({tuple(own) for own in seeds.values()}) > 1:
        listed = ", ".join(f"{label}: {' '.join(map(str, own))}" for label, own in seeds.items())
        notes.append(f"the labels have different seeds ({listed}); differences are over the seeds that both have")
    if single := [label for label, own in seeds.items() if len(own) == 1]:
        notes.append(f"one seed only, so no interval: {some(single)}")
    return notes


def some(names: Sequence[str], most: int = 6) -> str:
    """Names in a list, not too many."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _along(name: str, groups: Groups, fractions: Sequence[float], baseline: str | None, slack: float) -> Axis:
    """All labels at fractions of the largest amount of something that every run reaches."""
    everyone = [curve for curves in groups.values() for curve in curves]
    least = min(everyone, key=lambda curve: curve.totals[name])
    budgets = [
        Budget(share, amount := share * least.totals[name], stand(name, amount, groups, baseline, slack))
        for share in fractions
    ]
    return Axis(name, least.run.name, tuple(budgets))


def stand(name: str, amount: float, groups: Groups, baseline: str | None, slack: float) -> tuple[Place, ...]:
    """Where every label stands at one budget."""
    places = {label: _place(label, curves, name, amount, slack) for label, curves in groups.items()}
    other = places[baseline] if baseline is not None else None
    return tuple(
        replace(own, difference=paired(own, other))
        if other and own.values and other.values and own is not other
        else own
        for own in places.values()
    )


def _place(label: str, curves: Sequence[Curve], name: str, amount: float, slack: float) -> Place:
    """The values of a label's seeds at a budget, and those after it."""
    at = [i for curve in curves if (i := curve.at(name, amount * (1 + slack))) is not None]
    if len(at) < len(curves):  # the seeds that were early would be other runs
        return Place(label)
    ends = [
        i if curve.costs[name][i] >= amount * (1 - 1e-9) else min(i + 1, len(curve.values) - 1)
        for curve, i in zip(curves, at)
    ]
    values, later = ({curve.run.seed: curve.values[i] for curve, i in zip(curves, chosen)} for chosen in (at, ends))
    measured, after = (
        fmean([curve.costs[name][i] for curve, i in zip(curves, chosen)]) / amount for chosen in (at, ends)
    )
    return Place(label, values, later, measured, after if ends != at else None, estimate(list(values.values())))


def paired(these: Place, those: Place) -> Difference:
    """Differences seed by seed, over the seeds that both have."""
    seeds = [seed for seed in these.values if seed in those.values]
    if not seeds:
        return Difference(0, None)
    difference = estimate([these.values[seed] - those.values[seed] for seed in seeds])
    words = direction(difference)
    this, that = (max, min) if words == LOWER else (min, max)  # the least favourable to what is said
    worst = estimate([this(these.values[s], these.later[s]) - that(those.values[s], those.later[s]) for s in seeds])
    return Difference(len(seeds), difference, words not in (HIGHER, LOWER) or direction(worst) == words)


def direction(gap: Estimate | None) -> str:
    """What a mean difference says."""
    if gap is None:
        return "no common seed"
    if gap.half is None:
        return "one seed: cannot tell"
    if gap.n == 2 and gap.half <= 1e-12 < abs(gap.mean):
        return "two equal differences: cannot tell"  # by chance, as few problems make coarse steps: their spread is not 0
    return NOISE if abs(gap.mean) <= gap.half + 1e-12 else HIGHER if gap.mean > 0 else LOWER


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half the width of its t interval: with a handful of seeds a bootstrap interval would be too narrow."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Estimate(n, mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(n, mean, student_quantile(n - 1) * deviation / math.sqrt(n))


@lru_cache(maxsize=64)
def student_quantile(df: int) -> float:
    """The t for which Student's distribution with `df` degrees of freedom has SHARE of its mass within -t and t."""
    low, high = 0.0, 1.0
    while within(high, df) < SHARE:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if within(middle, df) < SHARE else (low, middle)
    return high


def within(t: float, df: int) -> float:
    """The mass of Student's distribution within -t and t, exact for whole `df` (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for i in range(df // 2):
        total += term
        term *= cosine**2 * ((2 * i + 2) / (2 * i + 3) if df % 2 else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
