"""What does a run take at most, planned and measured? `python -m benchmarks.peak --shapes full autocast lora`.

Three shapes of a step, few and short answers, many, and long ones, in rows of their own: `python -m benchmarks.peak --shapes full more longer`. The
status is 1 where a plan is off by more than --within (15 %).

Each shape is two steps of GRPO on SmolLM2 by `ramulus train` in a process of its own: 2 prompts x 8 answers that all run to their limit of 64 tokens
(sampled at temperature 2, graded by the parity of their length). The figure is the largest resident set of that process, from its start to the
last checkpoint, and of each further rank; planned is what `ramulus plan` says of the same words. The model's folder is the one that
`python -m ramulus.models.smollm2` makes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.pairing import record, table
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.recipes import grpo
from ramulus.recipes.quickstart_real import SMOL
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import build
from ramulus.run.memory.report import beside, planned
from ramulus.run.memory.step import SPELLED, StepMemory

SHAPES = {
    "full": "autocast=false",
    "autocast": "autocast=true engine.precision=bfloat16",
    "lora": "autocast=false lora=true",
    "lora autocast": "autocast=true lora=true engine.precision=bfloat16",
    "checkpointing": "autocast=false activation_checkpointing=true",
    "autocast checkpointing": "autocast=true activation_checkpointing=true engine.precision=bfloat16",
    "small rows": "autocast=false tokens_per_batch=512",
    "bfloat16": "autocast=false model.dtype=bfloat16",
    "more": "autocast=false schedule.prompts=4",
    "sharded": "autocast=false learner=sharded learner.ranks=2",
    "sharded checkpointing": "autocast=false learner=sharded learner.ranks=2 activation_checkpointing=true",
    "sharded lora": "autocast=false learner=sharded learner.ranks=2 lora=true",
    "sharded more": "autocast=false learner=sharded learner.ranks=2 schedule.prompts=4",
    "longer": "autocast=false response_limit=256",
    "long": "autocast=true activation_checkpointing=true response_limit=256 tokens_per_batch=8192 engine.precision=bfloat16",
}


LOOK = 0.1  # seconds between two looks at what processes have taken at most


@dataclass(frozen=True)
class Parity:
    """1 for an answer whose text has an odd length: something that half of random texts have."""

    def __call__(self, task: Task, path: Response) -> float:
        return float(len(path.text) % 2)


def recipe() -> Run:
    """Two steps whose answers all run to the limit."""
    changes: dict[str, Any] = {"rewards": Parity(), "evals": None, "steps": 2, "save_every": 2, "schedule": Fixed(2), "engine": Local(64)}
    return replace(grpo.recipe(), name="peak", branching=Star(8), temperature=2.0, tensorboard=False, **SMOL | changes)


def plan_of(words: str) -> list[StepMemory]:
    """What is planned for a run with these words; for each of its ranks, where it has several."""
    run = build(str(Path(__file__)), words.split())[0][0]
    memory = planned(run)
    return [memory, *(other for _, count, other in beside(run, memory) for _ in range(count))]


def compared(words: str) -> tuple[float, float]:
    """Bytes planned and measured."""
    return plan_of(words)[0].peak, measured(words)[0]


def measured(words: str) -> list[float]:
    """Bytes of the largest resident set of a run with these words; then those of the ranks that it started."""
    most: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ramulus.cli", "train", __file__, f"out={folder}/run", "threads=1", *words.split()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            for one in (process.pid, *ranks_of(process.pid)):
                most[one] = max(most.get(one, 0.0), largest(one))
            time.sleep(LOOK)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return list(most.values())


def ranks_of(process: int) -> list[int]:
    """The further ranks of `learner=sharded` that a process has started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(one) for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]
    except OSError:
        return []


def largest(process: int) -> float:
    """Bytes of the largest resident set of a process until now; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM:")), default=0.0)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["full", "autocast", "lora", "checkpointing", "small rows"])
    parser.add_argument("--within", type=float, default=0.15, help="share by which a plan may be off")
    rows, offs = [], []
    for name in parser.parse_args().shapes:
        for rank, (memory, most) in enumerate(zip(plan_of(SHAPES[name]), measured(SHAPES[name]), strict=True)):
            about = {"shape": name, "rank": rank, "words": SHAPES[name], "tokens at once": memory.tokens, "most": SPELLED[memory.phase]}
            found = {"planned GB": f"{memory.peak / 1e9:.2f}", "measured GB": f"{most / 1e9:.2f}", "off": f"{memory.peak / most - 1:+.0%}"}
            rows.append(about | found)
            offs.append(abs(memory.peak / most - 1))
            sys.stdout.write(f"{table(rows[-1:])}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{table(rows)}\n")
    record("peak", rows, "cpu")
    sys.exit(int(max(offs) > parser.parse_args().within))


if __name__ == "__main__":
    main()
