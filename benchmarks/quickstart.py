"""How much does the quickstart gain, seed by seed? `python -m benchmarks.quickstart --seeds 0 1 2 3 4`.

Runs `ramulus train quickstart` once per seed, reads each summary.json, and prints a row a seed and the medians as a Markdown
table, then one line of JSON for the record.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

NAMES = ("mean@8", "greedy", "pass@8")


def one(seed: int, out: Path, overrides: list[str]) -> dict:
    """The summary of one seed's run; an unfinished run is continued, a finished one is read."""
    folder = out / f"seed-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            "-m",
            "ramulus.cli",
            "train",
            "quickstart",
            f"seed={seed}",
            f"out={folder}",
            *overrides,
        ]
        with (out / f"seed-{seed}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(summary.read_text())


def row(label: str, before: dict, after: dict, seconds: float) -> str:
    """A line of the table: before, after and gain in points."""
    cells = [f"{100 * before[n]:.1f} -> {100 * after[n]:.1f} ({100 * (after[n] - before[n]):+.1f})" for n in NAMES]
    return f"| {label} | " + " | ".join(cells) + f" | {seconds:.0f} |"


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quickstart"))
    parser.add_argument("overrides", nargs="*", help="field=value, as for ramulus train")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {seed: one(seed, args.out, args.overrides) for seed in args.seeds}
    print(f"| seed | {' | '.join(NAMES)} | seconds |\n|{'---|' * (len(NAMES) + 2)}")
    for seed, summary in found.items():
        print(row(str(seed), summary["before"], summary["after"], summary["seconds"]))
    middle = {
        when: {n: statistics.median(s[when][n] for s in found.values()) for n in NAMES} for when in ("before", "after")
    }
    print(row("median", middle["before"], middle["after"], statistics.median(s["seconds"] for s in found.values())))
    gains = {n: [round(s["after"][n] - s["before"][n], 4) for s in found.values()] for n in NAMES}
    print(
        json.dumps({"benchmark": "quickstart", "machine": platform.processor() or platform.machine(), "gains": gains})
    )


if __name__ == "__main__":
    main()
