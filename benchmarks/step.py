"""How long is a whole GRPO step, against TRL's GRPOTrainer? `python -m benchmarks.step --shape S`.

Generation, reward, loss, backward pass and optimizer of TRL 1.16 (in an environment of its own, made at the first use), of ramulus's GRPO, and
of a TreePO step that yields as many trajectories. Same weights, same prompts in the same order, same number of trajectories, fp32 on both
sides, one step of each in turn. With random weights every response has the full length; `--shape quickstart` starts from the quickstart's
supervised model, whose responses end by themselves; `--shape smollm2 --clock cpu` takes a pretrained one, with `--precision bfloat16` the
products of both sides in bfloat16 and their weights in float32. Before anything is timed, TRL's first batch and the gradient of its loss are
compared with what ramulus makes of the same completions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.pairing import SHAPES, Spread, interleave, machine, ratio, spread, table
from benchmarks.rivals.agreement import agree
from benchmarks.rivals.environment import Worker
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip, DualClip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained, characters
from ramulus.models.smollm2 import SMOLLM2
from ramulus.run.ahead import AheadRollouts
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.interrupt import Interrupt
from ramulus.run.logbook import Logbook
from ramulus.run.rollouts import epoch_order
from ramulus.run.runtime import collect_seldom, model_path
from ramulus.run.stage import build_parts, rollouts_of
from ramulus.run.trainer import Trainer, TrainerState
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import Problem

LETTERS = string.ascii_letters + string.digits  # random prompts are written in these, a token each
GRPO = Mix((Term(Estimator(Clip(0.2, 0.2), Behavior(), GroupMean(std=True)), normaliser=SequenceMean()),))
TREEPO = Mix((Term(Estimator(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()), normaliser=TokenMean()),))
SFT = Path("runs/benchmark-accuracy/seed-0/sft")  # the quickstart's supervised model, as benchmarks.accuracy makes it

GENTLE = AdamW(lr=1e-6)  # the lengths of responses stay what they are


@dataclass(frozen=True)
class Listed:
    """Problems as they are."""

    problems: tuple[Problem, ...]

    def __call__(self) -> list[Problem]:
        return list(self.problems)


@dataclass(frozen=True)
class Digits:
    """A reward that any response can earn: the last digit of the sum of its token ids, between 0 and 0.9."""

    def __call__(self, task: Task, path: Response) -> float:
        return sum(path.tokens) % 10 / 10


@dataclass(frozen=True)
class Setting:
    """What all contenders are given."""

    model: str  # folder
    problems: tuple[Problem, ...]
    reward: Any
    prompts: int
    width: int
    prompt: int  # tokens of a prompt, at most
    response: int  # tokens of a response, at most
    exact: bool  # every response has exactly that many
    segment: int  # tokens of a TreePO segment
    steps: int
    tokens: int  # of a packed row
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    optimizer: AdamW = GENTLE
    seed: int = 0
    engine_threads: int | None = None  # of torch while ramulus samples
    precision: str = "float32"  # of products
    template: str | None = "{problem}"  # None: the chat template, over the problems' messages

    def run(self, name: str, out: Path) -> Run:
        """The ramulus run of this name, grpo or treepo."""
        tree = Segments(self.width, -(-self.response // self.segment), self.segment, branching=2)
        half = self.precision == "bfloat16"
        engine = Local(slots=256, threads=self.engine_threads, precision="bfloat16" if half else None)
        return Run(
            name=name, model=Pretrained(self.model, dtype=self.dtype), tasks=Listed(self.problems), rewards=self.reward, template=self.template,
            prompt_limit=self.prompt, response_limit=self.response, branching=Star(self.width) if name == "grpo" else tree,
            schedule=Fixed(self.prompts), mix=GRPO if name == "grpo" else TREEPO, steps=self.steps, optimizer=self.optimizer,
            tokens_per_batch=self.tokens, engine=engine, seed=self.seed, threads=self.threads, device=self.device, autocast=half,
            save_every=10**6, trees_every=5, tensorboard=False, out=str(out / name),
        )  # fmt: skip

    def rival(
        self, micro: int, out: Path, loss: str = "grpo", clip: tuple[float, float] = (0.2, 0.2)
    ) -> dict[str, Any]:
        """TRL's settings; it takes the problems in the order in which ramulus draws them."""
        order = epoch_order(self.seed, 0, len(self.problems))
        rows = out / "rows.jsonl"
        drawn = [self.problems[i] for i in order]
        rows.write_text("".join(json.dumps({"prompt": list(p.messages or ()) or p.text, "answer": p.answer}) + "\n" for p in drawn))
        rates = [self.optimizer.rate(n, self.steps) for n in range(1, self.steps + 1)]
        kind = {Digits: "digits", ChainAnswer: "chain", Boxed: "boxed"}[type(self.reward)]
        return {
            "model": self.model, "rows": str(rows), "reward": kind, "prompts": self.prompts, "width": self.width, "micro": micro,
            "response": self.response, "exact": self.exact, "rates": rates, "loss": loss, "clip": clip,
            "dtype": self.dtype, "device": self.device, "half": "bfloat16" in (self.dtype, self.precision),
            "betas": self.optimizer.betas, "seed": self.seed,
        }  # fmt: skip


class Mine:
    """A ramulus run that makes one step at a time, with all that a run does: trees, gauges, metrics."""

    def __init__(self, run: Run, exact: bool) -> None:
        parts = build_parts(run, None)
        stop = replace(parts.stop, eos=()) if exact else parts.stop
        run.folder.mkdir(parents=True, exist_ok=True)
        rollouts = AheadRollouts(rollouts_of(run, parts, stop), 0, run.steps)
        logbook = Logbook(run, Console(quiet=True))
        self.trainer = Trainer(run, parts.learner, parts.engine, rollouts, [], logbook, Interrupt(), TrainerState())
        self.parts, self.loop = parts, asyncio.new_event_loop()
        self.metrics: list[dict[str, Any]] = []

    def step(self) -> None:
        """One step and its line of metrics."""
        self.loop.run_until_complete(self._step())

    async def _step(self) -> None:
        found = await self.trainer.step()
        self.trainer.state.pending = found
        await self.trainer.close_step()
        self.metrics.append(found)

    def close(self) -> None:
        """Close its files."""
        self.trainer.logbook.close()
        self.loop.close()


def random_model(shape: str, dtype: torch.dtype, folder: Path) -> str:
    """A folder with a model of random weights and a tokenizer with one token a letter."""
    model = SHAPES[shape](dtype=dtype)
    model.save_pretrained(folder)
    characters(LETTERS).save_pretrained(folder)
    return str(folder)


def setting_of(args: argparse.Namespace, folder: Path) -> Setting:
    """The setting of a shape."""
    steps = args.repeats + 2
    common: dict[str, Any] = {
        "steps": steps,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    small = args.shape == "quickstart"
    prompts, width = args.prompts or (64 if small else 4), args.width or 8
    common |= {"segment": args.segment or (8 if small else 32), "engine_threads": args.engine_threads, "precision": args.precision}
    if small:
        model = args.model or str(SFT)
        problems = tuple(ChainSum(prompts * steps, "train")())
        return Setting(model_path(model), problems, ChainAnswer(), prompts, width, 16, 64, False, **common)
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(LETTERS, k=64)) for _ in range(prompts * steps)]
    problems = tuple(Problem(text, text) for text in texts)
    if args.shape == "smollm2":
        model = args.model or str(SMOLLM2)
    else:
        model = random_model(args.shape, getattr(torch, args.dtype), folder / "model")
    return Setting(model, problems, Digits(), prompts, width, 64, args.response, True, **common)


def check_counts(setting: Setting, told: dict[str, list[dict[str, Any]]], mine: dict[str, Mine]) -> None:
    """Raise unless every step of every contender had the same number of trajectories and, at equal lengths, of trained tokens."""
    wanted = setting.prompts * setting.width
    for name, answers in told.items():
        rows, tokens = {a["rows"] for a in answers}, {a["tokens"] for a in answers}
        if rows != {wanted} or (setting.exact and tokens != {wanted * setting.response}):
            raise AssertionError(f"{name} trained {rows} trajectories and {tokens} tokens, not {wanted}")
    for name, run in mine.items():
        paths, tokens = {m["paths"] for m in run.metrics}, {round(m["paths"] * m["length"]) for m in run.metrics}
        if paths != {wanted} or (setting.exact and tokens != {wanted * setting.response}):
            raise AssertionError(f"ramulus {name} learned from {paths} trajectories of {tokens} tokens, not {wanted}")


def rows_of(
    shape: str, seconds: dict[str, list[float]], told: dict[str, list[dict[str, Any]]], mine: dict[str, Mine]
) -> list[dict[str, Any]]:
    """A row a contender, TRL's fastest last among TRL's."""
    best = min(told, key=lambda name: spread(seconds[name]).median)
    rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {"shape": shape, "contender": name, "seconds a step": str(spread(taken))}
        if name in told:
            length = sum(a["tokens"] for a in told[name]) / sum(a["rows"] for a in told[name])
            row |= {
                "trajectories": told[name][-1]["rows"],
                "length": f"{length:.1f}",
                "reuse": "",
                "speed-up": "1" if name == best else "",
            }
        else:
            found = mine[name.removeprefix("ramulus ")].metrics
            length, reuse = (sum(m[key] for m in found) / len(found) for key in ("length", "reuse_ratio"))
            faster: Spread = ratio(seconds, name, best)
            grown = spread([m["seconds"]["grow"] / m["seconds"]["step"] for m in found]).median
            row |= {
                "trajectories": found[-1]["paths"],
                "length": f"{length:.1f}",
                "reuse": f"{reuse:.2f}",
                "speed-up": str(faster),
            }
            row |= {"sampling": f"{grown:.0%}"}
        rows.append(row)
    return rows


def measure(
    setting: Setting, micros: list[int], repeats: int, folder: Path, shape: str, clock: str, pages: bool
) -> tuple[list[dict[str, Any]], float]:
    """The rows of the table, and how far the gradients of one batch are apart."""
    mine = {name: Mine(setting.run(name, folder), setting.exact) for name in ("grpo", "treepo")}
    workers = {f"TRL {micro} rows a pass": Worker(setting.rival(micro, folder), setting.threads, pages) for micro in micros}
    try:
        collect_seldom()  # as the command line does after its imports
        first = next(iter(workers.values()))
        trainer = mine["grpo"].trainer
        apart = agree(first, trainer.learner.policy, setting, trainer.rollouts.decode, folder)
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}

        def ask(name: str) -> Callable[[], None]:
            return lambda: told[name].append(workers[name].ask("step"))

        contenders = {name: ask(name) for name in workers} | {f"ramulus {name}": run.step for name, run in mine.items()}
        clock = time.perf_counter if clock == "wall" else lambda: time.process_time() + sum(worker.spent for worker in workers.values())
        seconds = interleave(contenders, repeats, device=setting.device, clock=clock)
        check_counts(setting, told, mine)
        return rows_of(shape, seconds, told, mine), apart
    finally:
        for worker in workers.values():
            worker.close()
        for run in mine.values():
            run.close()


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S", choices=[*SHAPES, "smollm2"])
    parser.add_argument(
        "--model", default="", help="a model folder or run for --shape quickstart or smollm2, in place of its own"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="of products, beside float32 weights")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: the CPU seconds of all threads of a contender's process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--micro", type=int, nargs="+", default=[], help="sequences in one pass of TRL; several are several contenders"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in one packed row of ramulus")
    parser.add_argument("--segment", type=int, default=0, help="tokens of a TreePO segment")
    parser.add_argument("--prompts", type=int, default=0, help="of a step; 0: 4, of the quickstart's model 64")
    parser.add_argument("--width", type=int, default=0, help="trajectories of a prompt; 0: 8")
    parser.add_argument("--response", type=int, default=128, help="tokens of each response, of equal lengths")
    parser.add_argument("--large-pages", action="store_true", help="of memory for TRL too, which ramulus's command asks for and TRL does not")
    parser.add_argument("--engine-threads", type=int, help="of torch while ramulus samples; by default as they are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(args, Path(folder))
        total = setting.prompts * setting.width
        micros = args.micro or [total // 4, total // 8]
        rows, apart = measure(setting, micros, args.repeats, Path(folder), args.shape, args.clock, args.large_pages)
    print(table(rows))
    print(f"\ngradient of TRL's first batch: relative difference {apart:.1e}\n")
    print(json.dumps({"benchmark": "step", "machine": machine(args.device), "gradient": apart, "rows": rows}))


if __name__ == "__main__":
    main()
