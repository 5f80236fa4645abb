"""My problems, my reward, my held-out set, from Python: `python examples/own_reward.py`, half a minute on a laptop.

A problem names two letters, and an answer is as good as its share of them. The problems lie in files as yours would; a small model is built from
nothing, so that nothing needs to be downloaded: take `Pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")` and problems of your own in its place.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

from ramulus import (
    AdamW,
    Behavior,
    Callback,
    Clip,
    Estimator,
    EvaluationDone,
    File,
    Fixed,
    GroupMean,
    Mix,
    Result,
    Run,
    Scratch,
    Star,
    Task,
    Term,
    train,
)
from ramulus import (
    Path as Response,
)

LETTERS = "abcdefgh"


def write_problems(folder: Path) -> tuple[Path, Path]:
    """The files of problems to train on and of held-out ones: rows with a `problem` and an `answer`."""
    pairs = list(itertools.permutations(LETTERS, 2))
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "held.jsonl"
    for file, part in zip(files, (pairs[:40], pairs[40:])):
        file.write_text("".join(json.dumps({"problem": f"{a}{b}?", "answer": a + b}) + "\n" for a, b in part))
    return files


def reward(task: Task, path: Response) -> dict[str, float]:
    """The share of the answer that is one of the two letters; `correct`, where a reward says so, is what is counted as solved."""
    share = sum(letter in task.answer for letter in path.text) / path.length
    return {"reward": share, "correct": float(share > 0.8)}


class Watch(Callback):
    """Says what the evaluations measure."""

    def on_evaluation(self, event: EvaluationDone) -> None:
        event.say(f"after step {event.step} {event.scores['eval/mean']:.0%} of the answers to held-out problems are right")


def main(folder: Path, steps: int = 60) -> Result:
    """Train, and say what came of it."""
    problems, held_out = write_problems(folder)
    run = Run(
        name="own-reward", model=Scratch(LETTERS + "?", hidden=64, init_std=0.06), tasks=File(str(problems)), evals=File(str(held_out)),
        rewards=reward, template="{problem}", prompt_limit=4, response_limit=6, branching=Star(8), schedule=Fixed(24), eval_every=20,
        mix=Mix((Term(Estimator(Clip(0.2, 0.28), Behavior(), GroupMean())),)), steps=steps, optimizer=AdamW(lr=3e-3, warmup=5), save_every=20,
    )  # fmt: skip
    result = train(run, callbacks=[Watch()], out=folder / "run", fresh=True)
    print(result)
    print(result.trees(limit=1))
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-reward"))
