"""Small run folders made by hand, for the tests of the comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from ramulus.look.compare.compare import Comparison, Place
from ramulus.look.compare.tables import publish


def stage(
    folder: Path, evals: dict[int, float], steps: int, sampled: int = 10, trained: int = 5, cpu: bool = True
) -> None:
    """A metrics.jsonl of `steps` steps that each cost the same: 2 seconds, 1 CPU second, and 100 more seconds for an evaluation."""
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "sampled": sampled,
            "trained": trained,
            "reward": step / 10,
            "seconds": {"grow": 1.5, "step": 2.0, "mean": 9.0},
        }
        row |= {"cpu_seconds": 1.0} if cpu else {}
        if step in evals:
            row |= {"eval/mean": evals[step], "seconds": row["seconds"] | {"eval": 100.0}}
        lines.append(json.dumps(row) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines))


def run(folder: Path, seed: int, stages: int = 1, finished: bool = True) -> Path:
    """What else a run folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"stages": [{"seed": seed}] * stages}))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def sweep(
    folder: Path, labels: dict[str, list[dict[int, float]]], sampled: dict[str, int] | None = None, **options: int
) -> Path:
    """LABEL/seed-N for every label and its evaluations by seed."""
    for label, seeds in labels.items():
        for seed, evals in enumerate(seeds):
            stage(run(folder / label / f"seed-{seed}", seed), evals, 4, (sampled or {}).get(label, 10), **options)
    (folder / "sweep.json").write_text(json.dumps({"labels": list(labels)}))
    return folder


def two_labels(folder: Path) -> Path:
    """One label that samples 10 tokens a step, one that samples 20; three seeds; measured at steps 2 and 4."""
    thrifty = [{2: 0.1, 4: 0.4}, {2: 0.2, 4: 0.5}, {2: 0.3, 4: 0.9}]
    lavish = [{2: 0.2, 4: 0.6}, {2: 0.3, 4: 0.7}, {2: 0.4, 4: 1.1}]
    return sweep(folder, {"thrifty": thrifty, "lavish": lavish}, {"thrifty": 10, "lavish": 20})


def at(found: Comparison, axis: str, fraction: float) -> dict[str, Place]:
    """The places of all labels."""
    (budgets,) = (one.budgets for one in found.axes if one.name == axis)
    (budget,) = (one for one in budgets if one.fraction == fraction)
    return {place.label: place for place in budget.places}


def shown(found: Comparison) -> str:
    """What is printed."""
    out = io.StringIO()
    publish(found, Console(file=out), None, None, None, None)
    return out.getvalue()
