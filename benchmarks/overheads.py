"""What does ramulus cost beside sampling and learning? `python -m benchmarks.overheads`.

Three questions. Of a step of the quickstart's TreePO and of one of model S: which share goes to credit, packing, gauges, trees, ledger, metrics and
checkpoints, by the run's own clock, whose phases must add up to the step. From the command to the end of the first step of the quickstart: how
many seconds. `import ramulus` and `ramulus --help`: how many seconds, and that neither loads torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pairing import record, spread, table
from benchmarks.step import Mine, Setting, setting_of
from ramulus.recipes.quickstart import SCALE, SMALL
from ramulus.run.config.recipe import Run
from ramulus.run.runtime import collect_seldom

WORK = ("grow", "grade", "score", "update", "load")  # all other phases are overhead
EVERY = SMALL["save_every"]  # steps between checkpoints: a checkpoint's seconds are spread over them
STEPS = {"quickstart": SMALL["steps"]}  # a whole stage, whose first checkpoint alone is read back; of larger models those between two checkpoints


def watched(setting: Setting, folder: Path, save_every: int) -> Run:
    """A TreePO run as people run it: trees, TensorBoard and checkpoints as often as in the quickstart."""
    run = setting.run("treepo", folder)
    return replace(run, save_every=save_every, trees_every=SMALL["trees_every"], tensorboard=None)


def shares(shape: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row: seconds of each phase as a share of the whole, over a stage or the steps between two checkpoints."""
    steps = STEPS.get(shape, EVERY)
    chosen = argparse.Namespace(
        shape=shape,
        model=args.model,
        repeats=steps,
        dtype="float32",
        device=args.device,
        tokens=SCALE["tokens_per_batch"],
        segment=0,
        prompts=0,
        width=0,
        engine_threads=None,
        precision="float32",
        response=0,
    )
    setting = setting_of(chosen, folder)
    collect_seldom()  # as the command line does after its imports
    mine = Mine(watched(setting, folder, EVERY), setting.exact)
    try:
        for _ in range(steps + 1):  # the last one tells what the last checkpoint took
            mine.step()
    finally:
        mine.close()
    lines = [json.loads(line)["seconds"] for line in (folder / "treepo" / "metrics.jsonl").read_text().splitlines()]
    later = lines[1:]  # the first step of a process is slower than all others
    whole = sum(line["step"] for line in later)
    phases = {
        name: sum(line.get(name, 0.0) for line in later)
        for line in later
        for name in line
        if name not in ("step", "mean", "eval", "idle")
    }
    if not 0.99 < sum(phases.values()) / whole <= 1.000001:
        raise AssertionError(
            f"the phases make {sum(phases.values()):.3f} s of {whole:.3f} s: they overlap, or one is missing"
        )
    over = {name: seconds for name, seconds in phases.items() if name not in WORK}
    told = {name: f"{seconds / whole:.2%}" for name, seconds in sorted(phases.items(), key=lambda it: -it[1])}
    row = {
        "shape": shape,
        "steps": len(later),
        "seconds a step": f"{whole / len(later):.3f}",
        "overhead": f"{sum(over.values()) / whole:.2%}",
    }
    return row | told


def first_step(device: str) -> float:
    """Seconds from the command to the first line of the quickstart's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "ramulus.cli", "train", "quickstart", f"out={out}", f"device={device}"]
        said = (Path(folder) / "log").open("w+")
        began = time.perf_counter()
        with said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
            try:
                metrics = out / "1-sft" / "metrics.jsonl"
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None:
                        said.seek(0)
                        raise RuntimeError(f"the quickstart ended early: {said.read()[-2000:]}")
                    time.sleep(0.01)
                return time.perf_counter() - began
            finally:
                process.kill()


def start(words: list[str]) -> float:
    """Seconds of a command; raises where it fails."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def starts(repeats: int, device: str) -> list[dict[str, Any]]:
    """Rows of what happens before the first step; Python's own start is one of them."""
    loaded = (
        "import sys, ramulus.cli; assert 'torch' not in sys.modules; import ramulus; assert 'torch' not in sys.modules"
    )
    start(["-c", loaded])
    asked = {
        "python -c pass": (["-c", "pass"], ""),
        "import ramulus": (["-c", "import ramulus"], "0.3"),
        "ramulus --help": (["-m", "ramulus.cli", "--help"], "0.5"),
    }
    rows = []
    for name, (words, target) in asked.items():
        rows.append({"command": name, "seconds": str(spread([start(words) for _ in range(repeats)])), "target": target})
    first = [first_step(device) for _ in range(repeats)]
    return [*rows, {"command": "quickstart to its first step", "seconds": str(spread(first)), "target": "10"}]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["quickstart", "S"])
    parser.add_argument(
        "--model",
        default="",
        help="the quickstart's supervised model, where it is not where benchmarks.accuracy makes it",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-starts", action="store_true", help="leave out the times of starting")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(shares(shape, args, Path(folder)))
    if rows:
        print(table(rows), end="\n\n")
    begun = [] if args.no_starts else starts(args.repeats, args.device)
    if begun:
        print(table(begun), end="\n\n")
    record("overheads", rows + begun, args.device)


if __name__ == "__main__":
    main()
