"""How long until a task is learned, TRL's GRPO against ramulus's GRPO and TreePO? `python -m benchmarks.accuracy --seeds 0 1 2`.

All start from the same supervised model (the quickstart's first stage, made once a seed and kept) and train with the same learning rates, prompts
a step and width. Every few steps the same evaluator, ramulus's, measures held-out accuracy on the weights; the time of that is not counted. A
contender is done when its mean reaches the threshold. Seconds are those of the steps alone, start-up excluded; with `--clock cpu` they are
CPU seconds of all threads. `--task sums --threshold 0.8` takes SmolLM2-135M-Instruct and sums of three digits, products in bfloat16 on all sides.

A finished pair of seed and contender is kept as one JSON file and not run again, so the command can be stopped and repeated; a pair under way
is lost. `--table` only shows what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.pairing import machine, table
from benchmarks.rivals.environment import Worker
from benchmarks.step import Mine, Setting
from ramulus.engine.engine import Sampling
from ramulus.look.evaluation.evaluate import evaluate
from ramulus.models.smollm2 import SMOLLM2
from ramulus.recipes.quickstart import SMALL
from ramulus.recipes.quickstart import recipe as quickstart
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.runtime import model_path
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.math import Boxed
from ramulus.tasks.sums import Sums

OUT = Path("runs/benchmark-accuracy")
CONTENDERS = ("trl", "grpo", "treepo")
SAMPLES = 8
TASKS: dict[str, Any] = {"chain": ChainSum, "sums": Sums}


def sft() -> Run:
    """The quickstart's first stage alone, as a recipe: `ramulus train benchmarks/accuracy.py:sft`."""
    return quickstart()[0]


def start(seed: int, out: Path) -> str:
    """The folder of a seed's supervised model, made where it is missing."""
    folder = out / f"seed-{seed}" / "sft"
    if not (folder / "checkpoints" / f"step-{sft().steps:06d}").is_dir():
        recipe = f"{Path(__file__)}:sft"
        command = [sys.executable, "-m", "ramulus.cli", "train", recipe, f"seed={seed}", f"out={folder}", "--resume"]
        with (out / f"seed-{seed}.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return model_path(str(folder))


def setting_of(task: str, seed: int, model: str, steps: int, threads: int) -> Setting:
    """The quickstart's second stage, or `smol`, as all contenders see it."""
    if task == "sums":
        problems, small = tuple(Sums(8 * steps, seed=seed)()), AdamW(lr=1e-5)
        return Setting(
            model, problems, Boxed(), 8, 8, 160, 64, False, 8, steps, 4096,
            threads=threads, optimizer=small, seed=seed, precision="bfloat16", template=None,
        )  # fmt: skip
    problems = tuple(ChainSum(SMALL["schedule"].prompts * steps, "train", seed=seed)())
    return Setting(
        model, problems, ChainAnswer(), SMALL["schedule"].prompts, 8, SMALL["prompt_limit"], SMALL["response_limit"], False, 8, steps,
        SMALL["tokens_per_batch"], threads=threads, optimizer=SMALL["optimizer"], seed=seed, engine_threads=SMALL["engine"].threads,
    )  # fmt: skip


class Evaluator:
    """Held-out mean@8 and greedy accuracy of weights, by ramulus's own engine, apart from any training."""

    def __init__(self, setting: Setting, problems: Any, folder: Path) -> None:
        run = replace(setting.run("grpo", folder), evals=problems, out=str(folder / "evaluator"))
        self.mine = Mine(run, exact=False)
        self.run, self.trainer = run, self.mine.trainer
        self.tasks = self.mine.parts.evals

    def __call__(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Accuracies of a state dict."""
        return asyncio.run(self.measure(weights))

    async def measure(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Load, then answer every problem."""
        engine, rollouts = self.trainer.engine, self.trainer.rollouts
        await engine.load(weights, engine.version + 1)
        sampling = Sampling(self.run.response_limit)
        found = await evaluate(
            engine,
            self.tasks,
            self.run.weighted(),
            rollouts.decode,
            rollouts.stop,
            sampling,
            SAMPLES,
            True,
            self.run.seed,
        )
        return {"mean": found[f"mean@{SAMPLES}"], "greedy": found["greedy"], "length": found["length"]}


def train(
    step: Callable[[], float],
    weights: Callable[[], dict[str, torch.Tensor]],
    evaluator: Evaluator,
    steps: int,
    every: int,
    threshold: float,
) -> dict[str, Any]:
    """Step and measure in turn until the threshold is reached; `step` answers its seconds."""
    curve = [{"step": 0, "seconds": 0.0} | evaluator(weights())]
    spent = 0.0
    began = time.perf_counter()
    for number in range(1, steps + 1):
        spent += step()
        if number % every and number < steps:
            continue
        curve.append({"step": number, "seconds": spent} | evaluator(weights()))
        print(json.dumps(curve[-1] | {"so far": round(time.perf_counter() - began)}), file=sys.stderr, flush=True)
        if curve[-1]["mean"] >= threshold:
            break
    reached = curve[-1]["mean"] >= threshold
    return {"reached": reached, "steps": curve[-1]["step"], "seconds": spent, "curve": curve}


def contend(name: str, setting: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One contender from the supervised model to the threshold."""
    evaluator = Evaluator(setting, TASKS[args.task](args.problems, "test"), folder)
    if name == "trl":
        with Worker(setting.rival(args.micro, folder), setting.threads) as worker:
            path = folder / "weights.safetensors"

            def saved() -> dict[str, torch.Tensor]:
                worker.ask("save", path=str(path))
                return load_file(path)

            def asked() -> float:
                before = worker.spent
                told = worker.ask("step")
                return float(told["seconds"] if args.clock == "wall" else worker.spent - before)

            found = train(asked, saved, evaluator, args.steps, args.every, args.threshold)
            return found | {"versions": worker.versions}
    mine = Mine(setting.run(name, folder), exact=False)

    def step() -> float:
        clock = time.perf_counter if args.clock == "wall" else time.process_time
        before = clock()
        mine.step()
        return clock() - before

    policy = mine.trainer.learner.policy
    return train(step, lambda: policy.model.state_dict(), evaluator, args.steps, args.every, args.threshold)


def one(seed: int, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a contender reached from one seed; read where it is finished."""
    path = args.out / f"seed-{seed}" / f"{name}-{args.threshold:g}.json"
    if not path.exists():
        model = str(SMOLLM2) if args.task == "sums" else start(seed, args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            setting = setting_of(args.task, seed, model, args.steps, torch.get_num_threads())
            found = contend(name, setting, args, Path(folder))
        part = path.with_suffix(".part")
        part.write_text(
            json.dumps(found | {"contender": name, "seed": seed, "threads": torch.get_num_threads()}, indent=1)
        )
        part.rename(path)
    return json.loads(path.read_text())


def rows_of(found: dict[tuple[int, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a seed and contender, then the medians over the seeds that all contenders finished."""
    rows = []
    for (seed, name), it in sorted(found.items()):
        trl = found.get((seed, "trl"))
        seconds = f"{it['seconds']:.0f}" if it["reached"] else f"not within {it['seconds']:.0f}"
        faster = f"{trl['seconds'] / it['seconds']:.2f}" if trl and trl["reached"] and it["reached"] else ""
        last = it["curve"][-1]
        rows.append({
            "seed": seed, "contender": name, "seconds": seconds, "steps": it["steps"], "seconds a step": f"{it['seconds'] / it['steps']:.2f}",
            "mean@8": f"{it['curve'][0]['mean']:.3f} -> {last['mean']:.3f}", "greedy": f"{it['curve'][0]['greedy']:.3f} -> {last['greedy']:.3f}",
            "speed-up": faster,
        })  # fmt: skip
    whole = [
        seed
        for seed in {seed for seed, _ in found}
        if all(found.get((seed, name), {}).get("reached") for name in CONTENDERS)
    ]
    for name in CONTENDERS if whole else ():
        seconds = [found[seed, name]["seconds"] for seed in whole]
        faster = [found[seed, "trl"]["seconds"] / found[seed, name]["seconds"] for seed in whole]
        steps = statistics.median(found[seed, name]["steps"] for seed in whole)
        rows.append({
            "seed": f"median of {len(whole)}", "contender": name, "seconds": f"{statistics.median(seconds):.0f}", "steps": steps,
            "speed-up": f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})",
        })  # fmt: skip
    return rows


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="chain", choices=TASKS)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the CPU seconds of all threads of a contender's process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--threshold", type=float, default=0.65, help="held-out mean@8 at which a contender is done")
    parser.add_argument("--steps", type=int, default=SMALL["steps"], help="at most; the learning rate falls until then")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--problems", type=int, default=250, help="held-out problems")
    parser.add_argument("--micro", type=int, default=64, help="sequences in one pass of TRL")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in args.seeds:
        for name in args.contenders:
            if not args.table or (args.out / f"seed-{seed}" / f"{name}-{args.threshold:g}.json").exists():
                found[seed, name] = one(seed, name, args)
    print(f"held-out mean@8 of at least {args.threshold:g}, measured every {args.every} steps\n")
    print(table(rows_of(found)))
    kept = [{k: v for k, v in it.items() if k != "curve"} for it in found.values()]
    print(json.dumps({"benchmark": "accuracy", "threshold": args.threshold, "machine": machine(), "rows": kept}))


if __name__ == "__main__":
    main()
