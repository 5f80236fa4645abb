"""Draw the pictures of methods.md: `python docs/pictures.py` writes docs/pictures/*.svg, always the same ones.

The model is a toy: a table that knows a few answers to two sums and how likely each is. It has no attention, so the influence of a step is made
up here (the later steps, the nearer the more); all else is what a run does: the same rules grow the trees, the recipes' own mixes give the credit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Branching, Star, paths
from ramulus.grow.forks import AttentionForks, EntropyForks
from ramulus.grow.grading import grade
from ramulus.grow.growth import demonstrate, grow_forest
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.annotate import annotate
from ramulus.learn.packing.weights import select
from ramulus.look.viewer.picture import paint, picture
from ramulus.recipes import attnrl, grpo, hpt, luffy, ramulus, srft, treepo, treerl

FOLDER = Path(__file__).parent / "pictures"
SYMBOLS = ("", *"0123456789+-=?\n")  # token 0 ends a text
HARD = ("8-7-9-6?", "8-7=1\n1-9=-8\n-8-6=-14\n=-14")
EASY = ("4+7-9?", "4+7=11\n11-9=2\n=2")
KNOWN = {  # problem -> answers and their weights; of the hard one none is right
    HARD[0]: {
        "8-7=1\n1-9=2\n2-6=6\n=6": 4, "8-7=1\n1-9=2\n2-6=-4\n=-4": 3, "8-7=1\n1-9=-8\n-8-6=-2\n=-2": 3, "8-7=1\n1-9=-8\n-8-6=14\n=14": 2,
        "8-7=2\n2-9=-7\n-7-6=-13\n=-13": 2,
    },
    EASY[0]: {EASY[1]: 5, "4+7=11\n11-9=1\n=1": 3, "4+7=1\n1-9=-8\n=-8": 3, "4+7=12\n12-9=3\n=3": 2},
}  # fmt: skip


def encode(text: str) -> list[int]:
    return [SYMBOLS.index(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(SYMBOLS[token] for token in tokens)


def table() -> dict[tuple[int, ...], list[float]]:
    """Every beginning of a known answer -> the logits of what comes next."""
    weights: dict[tuple[int, ...], list[float]] = {(): [1.0] + [0.0] * (len(SYMBOLS) - 1)}
    for problem, answers in KNOWN.items():
        for answer, weight in answers.items():
            whole = [*encode(problem), *encode(answer), 0]
            for at in range(len(problem), len(whole)):
                row = weights.setdefault(tuple(whole[:at]), [0.0] * len(SYMBOLS))
                row[whole[at]] += weight
    return {context: [math.log(w) if w else -math.inf for w in row] for context, row in weights.items()}


def right(task: Task, path: Response) -> dict[str, float]:
    """1 for the right last line."""
    said = float(path.text.rsplit("\n", 1)[-1] == f"={task.answer}")
    return {"reward": said, "correct": said}


def mark(tree: Tree) -> None:
    """Where steps begin, and an influence of each: the later steps, the nearer the more."""
    for leaf in paths(tree):
        for node in leaf.line()[1:]:
            text = decode(node.tokens)
            starts = [i == 0 or text[i - 1] == "\n" for i in range(len(text))]
            later = leaf.response()[-1:] and decode(leaf.response()).count("\n") + 1
            scores, step = [], 0
            for begins in starts:
                step += begins
                scores.append(sum(1 / j for j in range(1, later - step + 1)))
            node.signals |= {"steps": [float(begins) for begins in starts], "influence": scores}


@dataclass(frozen=True)
class Scene:
    """One picture: what grows on which sum, who learns from it, and what is coloured."""

    branching: Branching
    problem: tuple[str, str] = EASY
    mix: Mix | None = None
    shown: int = 0  # demonstrations
    colour: str = "value"
    temperature: Any = 1.0
    seed: int = 0
    signals: dict[str, Any] = field(default_factory=dict)

    def grow(self) -> Tree:
        """The grown, graded tree, with its credit where a mix gives some."""
        text, answer = self.problem
        shown = ((*encode(answer), 0),) * self.shown
        task = Task(text, tuple(encode(text)), text, answer=answer.rsplit("=", 1)[-1], demonstrations=shown)
        tree = Tree.plant(task, seed=self.seed)
        demonstrate(tree, self.shown)
        engine = ToyEngine(len(SYMBOLS), table=table(), as_array=torch.tensor)

        async def between(trees: list[Tree]) -> None:
            for one in trees:
                mark(one)

        async def judge(one: Tree) -> None:
            await grade(one, ((right, 1.0, "chain"),), decode)

        sampling, stop = Sampling(40, self.temperature), Stop((0,), 40, decode)
        asyncio.run(grow_forest([tree], engine, self.branching, sampling, stop, (), judge, between))
        if self.mix is not None:
            gates, _ = self.mix.gates([tree], {})
            credits = self.mix.credit([tree])
            annotate([tree], self.mix, credits, select([tree], credits, self.mix, gates))
        return tree

    def draw(self) -> str:
        """The picture as the text of an SVG file."""
        tree = self.grow()
        return picture(tree, decode, paint(tree, self.colour), alone=True) + "\n"


def scenes() -> dict[str, Scene]:
    """The pictures by name."""
    temperature = ByEntropy(tau=0.1)
    temperature = temperature.given(temperature.measure([Scene(Star(8), seed=seed).grow() for seed in range(4)]))
    forks = AttentionForks(roots=3, points=2, branches=1, distance=4)
    return {
        "grpo": Scene(Star(5), mix=grpo.recipe().mix, colour="credit", seed=1),
        "treepo": Scene(Segments(width=8, depth=8, length=6, branching=2), mix=treepo.recipe().mix),
        "treerl": Scene(EntropyForks(roots=3, points=2, branches=1, closed=None), mix=treerl.recipe().mix),
        "attnrl": Scene(forks, mix=attnrl.recipe().mix, seed=1),
        "hapo": Scene(Star(5), temperature=temperature, colour="temperature", seed=1),
        "hpt-solved": Scene(Star(4), mix=hpt.recipe().mix, shown=1, colour="credit", seed=1),
        "hpt-failed": Scene(Star(4), HARD, mix=hpt.recipe().mix, shown=1, colour="credit"),
        "luffy": Scene(Star(4), HARD, mix=luffy.recipe().mix, shown=1, colour="credit"),
        "srft": Scene(Star(4), mix=srft.recipe().mix, shown=1, colour="credit", seed=1),
        "ramulus": Scene(forks, mix=ramulus.recipe().mix, shown=1, colour="credit", temperature=replace(temperature), seed=1),
    }


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, scene in scenes().items():
        (FOLDER / f"{name}.svg").write_text(scene.draw())


if __name__ == "__main__":
    main()
