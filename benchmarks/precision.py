"""Does a run in bfloat16 learn as one in float32? `python -m benchmarks.precision --seeds 0 1 2 --steps 20 --out runs/precision`.

SmolLM2 by `quickstart_real`, each precision with the same seeds, so that first steps see the same problems. Runs that are there go on where they
stopped, or are only read: it can be spread over days. Compared are mean reward over steps, held-out accuracy after the last step, and how
far sampler and learner are apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.pairing import record, spread, table
from ramulus.run.launch import launch

PRECISIONS = {
    "float32": ("autocast=false", "engine.precision=float32"),
    "bfloat16": ("autocast=true", "engine.precision=bfloat16"),  # float32 weights beside a copy
    "bfloat16 weights": ("autocast=false", "model.dtype=bfloat16", "engine.precision=bfloat16"),  # beside float32 masters
}


def run(name: str, seed: int, steps: int, out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, which is begun, gone on with, or read."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    overrides = [f"out={folder}", f"seed={seed}", f"steps={steps}", "final_evaluation=None", "trees_every=0", *PRECISIONS[name]]
    if launch("quickstart_real", overrides, True, False, Console()):
        raise RuntimeError(f"the run in {folder} failed")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summed(name: str, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the table: medians over seeds, least and greatest."""

    def over(metric: str) -> str:
        return str(spread([sum(row[metric] for row in rows) / len(rows) for rows in runs]))

    line: dict[str, Any] = {"precision": name, "seeds": len(runs), "steps": min(map(len, runs))}
    line |= {metric: over(metric) for metric in ("reward", "mismatch", "mismatch_max", "cpu_seconds")}
    line["held out after"] = str(spread([rows[-1].get("eval/mean", float("nan")) for rows in runs]))
    line["rewards"] = "; ".join(" ".join(f"{row['reward']:.2f}" for row in rows) for rows in runs)
    return line


def main() -> None:
    """Run, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    args = parser.parse_args()
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in args.precisions}
    for seed in args.seeds:
        for name, runs in found.items():
            runs.append(run(name, seed, args.steps, args.out))
    rows = [summed(name, runs) for name, runs in found.items()]
    print(table(rows))
    record("precision", rows)


if __name__ == "__main__":
    main()
