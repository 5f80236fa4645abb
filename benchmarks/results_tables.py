"""The tables of docs/results-smol.md: `python -m benchmarks.results_tables runs/smol/sums --baseline grpo`.

Of a folder of sweeps (LABEL/seed-N below it, at any depth): the last evaluation at equal steps, sampled tokens and CPU seconds, by
`ramulus compare`, and what a task that was not trained on made of each run. Markdown on standard output; --plots as in `compare`. `--keep FOLDER`
copies what the tables are made of, a few kilobytes a finished run, from which the same command makes them again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramulus.core.run_folder import WHEN, final_evaluation
from ramulus.look.compare.compare import estimate
from ramulus.look.curves import find_runs, rows

KEPT = ("step", "sampled", "trained", "cpu_seconds", "reward")  # of each row of metrics, beside its evaluations and seconds
AXES = {"sampled": "sampled tokens", "cpu_seconds": "CPU seconds"}


def compared(folders: list[Path], baseline: str, plots: Path | None, metric: str = "eval/mean") -> dict[str, Any]:
    """What `ramulus compare` finds, as it writes it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.json"
        command = [sys.executable, "-m", "ramulus.cli", "compare", *map(str, folders), "--baseline", baseline, "--metric", metric, "--json", str(out)]
        command += ["--finished", "--slack", "0.02", *(["--plots", str(plots)] if plots else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def between(mean: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """A share and half its interval, in per cent."""
    if mean is None or math.isnan(mean):
        return "-"
    half = "" if low is None or high is None else f" ± {50 * (high - low):.1f}"
    return f"{100 * mean:{sign}.1f}{half}"


def interval(values: Iterable[float]) -> str:
    """Mean and half the 95 % t interval, in per cent."""
    found = list(values)
    if not found:
        return "-"
    mean = estimate(found)
    return f"{100 * mean.mean:.1f}" + ("" if mean.half is None else f" ± {100 * mean.half:.1f}")


def printed(heads: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def name(label: str) -> str:
    """Without the recipe file's."""
    return label.removeprefix("results_smol-").replace("_", "-")


def chosen(found: Mapping[str, Any], axis: str) -> list[dict[str, Any]]:
    """The rows of the whole budget on this axis, the best first."""
    rows = [row for row in found["rows"] if row["axis"] == axis and row["fraction"] == 1.0]
    return sorted(rows, key=lambda row: -(row["mean"] or 0.0))


def other_task(runs: list[dict[str, Any]]) -> list[str]:
    """Mean before and after on the task that was not trained on, and the difference by seed."""
    pairs = []
    for run in runs:
        files = [final_evaluation(Path(run["folder"]), when) for when in ("before", "after")]
        if all(file.exists() for file in files):
            pairs.append([json.loads(file.read_text())["reward"] for file in files])
    return [interval(pair[0] for pair in pairs), interval(pair[1] for pair in pairs), interval(after - before for before, after in pairs)]


def keep(folders: Sequence[Path], out: Path) -> None:
    """Of each finished run its seed, what its steps cost and scored, and its final evaluations: into OUT/LABEL/seed-N."""
    for run in (run for run in find_runs(folders) if run.finished):
        target = out / run.folder.parent.name / run.folder.name
        target.mkdir(parents=True, exist_ok=True)
        (target / "run.json").write_text(json.dumps({"stages": [{"seed": run.seed}]}) + "\n")
        (target / "summary.json").write_text("{}\n")
        lines = []
        for row in rows(run.folder / "metrics.jsonl"):
            seconds = {name: row["seconds"][name] for name in ("step", "eval") if name in row.get("seconds", {})}
            scored = {name: value for name, value in row.items() if name in KEPT or name.startswith("eval/")}
            lines.append(json.dumps(scored | {"seconds": seconds}) + "\n")
        (target / "metrics.jsonl").write_text("".join(lines))
        for when in WHEN:
            if (file := final_evaluation(run.folder, when)).is_file():
                final_evaluation(target, when).write_text(json.dumps({"reward": json.loads(file.read_text())["reward"]}) + "\n")


def main() -> None:
    """Read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--baseline", default="results_smol-grpo")
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    folders = sorted({path.parent.parent for folder in args.folders for path in folder.rglob("run.json")})  # LABEL of LABEL/seed-N
    if args.keep is not None:
        keep(folders, args.keep)
    found = compared(folders, args.baseline, args.plots)
    greedy = {row["label"]: row for row in chosen(compared(folders, args.baseline, None, "eval/greedy"), "steps")}
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in found["curves"]:
        runs.setdefault(run["label"], []).append(run)

    def median(label: str, cost: str) -> float:
        return statistics.median(run["totals"][cost] for run in runs[label])

    lines = []
    for row in chosen(found, "steps"):
        label = row["label"]
        least = [between(row["mean"], row["low"], row["high"]), between(greedy[label]["mean"], None, None)]
        least += [between(row["difference"], row["difference_low"], row["difference_high"], "+"), row["verdict"] or "baseline"]
        spent = [f"{median(label, cost) / 1000:.0f}k" for cost in ("sampled", "trained")] + [f"{median(label, 'cpu_seconds'):.0f}"]
        lines.append([name(label), str(row["seeds"]), *least, *spent])
    printed(["recipe", "seeds", "mean", "greedy", "minus GRPO, by seed", "", "sampled tokens", "trained tokens", "CPU seconds"], lines)
    for axis, words in AXES.items():
        whole = chosen(found, axis)
        print(f"### At equal {words} ({whole[0]['budget']:,.0f})\n")
        printed(
            ["recipe", "mean", "measured at", "next value", "minus GRPO", ""],
            [
                [
                    name(row["label"]), between(row["mean"], row["low"], row["high"]), f"{row['measured_at']:.2f}" if row["measured_at"] else "-",
                    f"{between(row['next_mean'], None, None)} at {row['next_at']:.2f}" if row["next_at"] else "",
                    between(row["difference"], row["difference_low"], row["difference_high"], "+"), row["verdict"] or "",
                ]
                for row in whole
            ],
        )  # fmt: skip
    steps = found["curves"][0]["steps"]
    print("### By step\n")
    by_step = {label: list(zip(*(run["values"] for run in some if run["steps"] == steps), strict=True)) for label, some in runs.items()}
    printed(["recipe", *map(str, steps)], [[name(row["label"]), *map(interval, by_step[row["label"]])] for row in chosen(found, "steps")])
    print("### On the other task\n")
    printed(["recipe", "before", "after", "change, by seed"], [[name(label), *other_task(some)] for label, some in runs.items()])


if __name__ == "__main__":
    main()
