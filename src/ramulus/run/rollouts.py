"""Where a step's trees come from: tasks drawn in a seeded order, planted, shown demonstrations, grown, graded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ramulus.core import store
from ramulus.core.recipe_part import needed
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, correctness
from ramulus.engine.engine import Engine, Sampling, rule_features
from ramulus.grow.branching import path_lengths, paths
from ramulus.grow.demonstration import verify
from ramulus.grow.grading import grade
from ramulus.grow.growth import demonstrate, grow_forest, grow_round, prune, together
from ramulus.grow.stop import Stop
from ramulus.learn.objective.gate import demonstrated
from ramulus.look.cost.ledger import Fate, cost, costs, fates
from ramulus.look.evaluation.statistics import mean
from ramulus.run.config.recipe import Run
from ramulus.run.gated_engine import GatedEngine
from ramulus.run.signals import Signals
from ramulus.run.step_progress import StepProgress
from ramulus.tasks.grading_budget import grading_budget

Cursor = dict[str, Any]
"""Plain JSON: epoch and place in its order, visits of each task, the schedule's state, the temperature rule's numbers of the step before;
with `ahead` also `young`, the trees of the next step, which `cursor_to_json` makes JSON as well, and `asked`, how many of them are wanted."""


START: Cursor = {"epoch": 0, "place": 0, "visits": {}, "schedule": {}, "temperature": None}


@dataclass(frozen=True)
class Rollout:
    """The trees of one step: all that were grown, and those that are learned from."""

    grown: list[Tree]
    places: list[int]  # in `grown`, of those that are learned from
    draws: int
    wanted: int = 0  # trees that the schedule asked for
    before: int = 0  # tokens of these trees that were sampled in the step before
    ahead: int = 0  # tokens sampled meanwhile for the trees of the next step
    grading: float = 0.0  # seconds in which nothing but grades was awaited
    graders: dict[str, int] = field(default_factory=dict)  # grades that were cut or refused, graders that were lost

    @property
    def kept(self) -> list[Tree]:
        """The trees that are learned from."""
        return [self.grown[i] for i in self.places]

    def metrics(self, fate: Sequence[Fate] = ()) -> dict[str, float]:
        """Reward, pass rate, lengths and token counts; over everything grown, so that dropping trees does not flatter.

        `fate` says of each kept tree what the update did with its leaves.
        """
        fates_of: dict[int, Fate] = {place: {} for place in self.places} | dict(zip(self.places, fate))
        lost = cost(tree for i, tree in enumerate(self.grown) if i not in fates_of)
        trained = costs((tree, fates_of[i]) for i, tree in enumerate(self.grown) if i in fates_of)
        spent = trained + lost
        groups = [[leaf for leaf in tree.leaves() if leaf.author is Author.POLICY] for tree in self.grown]
        paths = [leaf for group in groups for leaf in group]
        counts: dict[str, float] = {
            "trees": len(self.grown),
            "dropped": len(self.grown) - len(self.kept),
            "draws": self.draws,
            "wanted": self.wanted,
            "paths": len(paths),
        }
        counts |= {"sampled": spent.sampled, "reused": spent.reused, "pruned": spent.pruned, "expert": spent.expert}
        counts |= {"sampled_before": self.before, "sampled_ahead": self.ahead, "trajectory": spent.trajectory}
        counts |= fates(trained, lost) | {"graded": 0, "correct": 0} | self.graders
        return (counts | path_metrics(paths) | mixed(groups) | {"reuse_ratio": spent.reuse_ratio}) if paths else counts


def path_metrics(paths: Sequence[Node]) -> dict[str, float]:
    """Means over the policy's paths; pruned ones count in lengths only, and in no reward those that an over-long filter took out."""
    graded = [leaf for leaf in paths if leaf.reward is not None]
    lengths = path_lengths(paths)
    means = {
        "length": mean(lengths),
        "length_max": float(max(lengths)),
        "truncated": mean([float(leaf.finish == "length") for leaf in paths]),
    }
    if graded:
        means["reward"] = mean([leaf.reward or 0.0 for leaf in graded])
    if judged := correctness(paths):
        means |= {"pass_rate": mean(judged), "graded": len(judged), "correct": sum(judged)}
    if any("answer" in leaf.verdict for leaf in paths):
        means["answered"] = mean([float(bool(leaf.verdict.get("answer"))) for leaf in paths if leaf.verdict])
    scaled = not judged and any(leaf.verdict for leaf in paths)  # rewards that call nothing right or wrong
    return {"reward": 0.0} | ({} if scaled else {"pass_rate": 0.0}) | means


def mixed(groups: Sequence[Sequence[Node]]) -> dict[str, float]:
    """Of the trees with at least two graded paths the share whose paths differ in reward, from the paths of each; nothing where there is none."""
    graded = [[leaf.reward for leaf in group if leaf.reward is not None] for group in groups]
    differ = [float(len(set(rewards)) > 1) for rewards in graded if len(rewards) > 1]
    return {"mixed": mean(differ)} if differ else {}


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """The numbers 0 to n - 1 in the order of one epoch."""
    return tuple(random.Random(f"{seed}/order/{epoch}").sample(range(n), n))


def cursor_to_json(cursor: Cursor) -> Cursor:
    """A cursor as plain JSON, for a checkpoint."""
    return cursor | {"young": [store.dump(tree).decode() for tree in cursor["young"]]} if "young" in cursor else cursor


def cursor_of_json(cursor: Cursor) -> Cursor:
    """A cursor from what `cursor_to_json` made of it."""
    return cursor | {"young": [store.load(line.encode()) for line in cursor["young"]]} if "young" in cursor else cursor


@dataclass
class Rollouts:
    """Grows the trees of each step; everything that lasts from step to step is in the cursor, handed in and back."""

    run: Run
    tasks: Sequence[Task]
    engine: Engine
    stop: Stop
    decode: Callable[[Sequence[int]], str]
    signals: Signals | None = None  # only rules that read signals need them
    progress: StepProgress | None = None  # for whoever shows where a step stands

    async def get(self, step: int, cursor: Cursor) -> tuple[Rollout, Cursor]:
        """The trees of `step`, and the cursor after it; the one handed in is left as it was."""
        with grading_budget(self.run.grading_seconds) as budget:
            rollout, cursor = await self.grow(step, cursor)
        return replace(rollout, graders=budget.metrics()), cursor

    async def grow(self, step: int, cursor: Cursor) -> tuple[Rollout, Cursor]:
        """Plant, grow and grade trees, draw after draw, until the schedule wants no more; `get` adds what the graders report."""
        cursor = cursor | {"visits": dict(cursor["visits"])}
        run, schedule, rule = self.run, self.run.schedule, self.run.temperature
        follows = "stats" in rule_features(rule)
        temperature = rule.given(cursor.get("temperature")) if follows else rule
        places: list[int] = []
        grown: list[Tree] = []
        draws = before = ahead = 0
        growth = self.growth(temperature, cursor)
        asked = cursor.pop("asked", 0) or schedule.asked(cursor["schedule"])
        while True:
            wanted, cursor["schedule"] = schedule([grown[i] for i in places], draws, cursor["schedule"])
            if wanted < 1:
                if follows:
                    if self.signals is not None:
                        await self.signals(grown, needed(rule))
                    cursor["temperature"] = rule.measure(grown) or cursor.get("temperature")
                return Rollout(grown, places[:asked], draws, asked, before, ahead, growth.engine.seconds), cursor
            if draws == 0 and (
                run.ahead or cursor.get("young")
            ):  # young trees of a run that looked ahead are finished first
                trees, before, ahead = await self.overlap(wanted, step, growth, cursor)
            else:
                trees = [self.plant(task, step, cursor) for task in self.draw(wanted, cursor)]
                await growth.check(trees)
                await growth.finish(trees)
            shown = run.mix.gate is not None
            places += [i for i, tree in enumerate(trees, len(grown)) if schedule.keep(tree) or (shown and demonstrated(tree))]
            grown += trees
            draws += 1

    def draw(self, n: int, cursor: Cursor) -> list[Task]:
        """The next n tasks; every epoch has an order of its own, and the last tasks of one are followed by the first of the next."""
        drawn: list[Task] = []
        while len(drawn) < n:
            order = epoch_order(self.run.seed, cursor["epoch"], len(self.tasks))
            take = order[cursor["place"] : cursor["place"] + n - len(drawn)]
            drawn += [self.tasks[i] for i in take]
            cursor["place"] += len(take)
            if cursor["place"] == len(order):
                cursor["epoch"], cursor["place"] = cursor["epoch"] + 1, 0
        return drawn

    def plant(self, task: Task, step: int, cursor: Cursor) -> Tree:
        """A tree for this visit of the task, with its demonstrations."""
        visit = cursor["visits"].get(task.id, 0)
        cursor["visits"][task.id] = visit + 1
        tree = Tree.plant(task, seed=self.run.seed, step=step, visit=visit)
        demonstrate(tree, self.run.demonstrations, self.run.response_limit)
        return tree

    async def overlap(self, wanted: int, step: int, growth: Growth, cursor: Cursor) -> tuple[list[Tree], int, int]:
        """The trees of `step`, whose first round grew a step ago: their other rounds are sampled together with the first round of the next step's.

        AttnRL's pipeline (arXiv 2509.26628, section 3.3). The first step, and one after a last step, grow both by themselves; the last
        step begins nothing. What grows is a copy of the young trees in the cursor, so that what stops half-way leaves them as they were.
        Also returns how many of their tokens were sampled before, and how many were sampled now for the next step's.
        """
        young = [tree.copy() for tree in cursor.pop("young", ())]
        before = cost(young).sampled
        if not young:
            young = [self.plant(task, step, cursor) for task in self.draw(wanted, cursor)]
            await growth.check(young)
            await growth.begin(young)
        following: list[Tree] = []
        if self.run.ahead and step < self.run.steps:
            cursor["asked"] = self.run.schedule.asked(cursor["schedule"])
            count, cursor["schedule"] = self.run.schedule([], 0, cursor["schedule"])
            following = [self.plant(task, step + 1, cursor) for task in self.draw(count, cursor)]
        await growth.check(
            following
        )  # a verifier takes its time: nothing may be decoding meanwhile, or the requests that are batched would depend on the clock
        await together([growth.finish(young), growth.begin(following)])
        if following:
            cursor["young"] = following
        return young, before, cost(following).sampled

    def growth(self, temperature: Any, cursor: Cursor) -> Growth:
        """How trees grow at this temperature; a schedule that chooses roots keeps its state in the cursor."""
        engine = GatedEngine(self.engine)
        if self.signals is not None:
            self.signals.context.quiet = engine.quiet
        return Growth(self.run, engine, self.stop, self.decode, self.signals, temperature, cursor, self.progress)


@dataclass
class Growth:
    """One recipe's growth, from the first round to the grades."""

    run: Run
    engine: GatedEngine
    stop: Stop
    decode: Callable[[Sequence[int]], str]
    signals: Signals | None
    temperature: Any
    cursor: Cursor
    progress: StepProgress | None = None

    def __post_init__(self) -> None:
        run = self.run
        self.sampling = Sampling(run.response_limit, self.temperature, run.top_p, run.top_k, run.min_p)
        self.rewards = run.weighted()
        self.late = [rule for rule in run.pruning if needed(rule)]  # asked when their signals are there
        self.soon = [rule for rule in run.pruning if not needed(rule)]
        self.names = needed(run.branching, run.schedule)
        self.expands = run.schedule.expand is not None

    async def check(self, trees: list[Tree]) -> None:
        """Let the verifier look at demonstrations, where that is asked for."""
        if self.run.check_demonstrations:
            with self.engine.grading():
                await together(verify(tree, self.rewards, self.decode) for tree in trees)

    async def begin(self, trees: list[Tree]) -> None:
        """The first round of young trees, and what rules and schedules want to know of it, by the weights that sampled it."""
        run = self.run
        await together(
            grow_round(tree, self.engine, run.branching, self.sampling, self.stop, self.soon) for tree in trees
        )
        if trees and self.waits():
            await self.between(trees)

    async def finish(self, trees: list[Tree]) -> list[Tree]:
        """Grow until the trees are done, from wherever they are, grading each as it is done; in rounds, for a rule or a schedule that looks
        at all of them in between."""
        run = self.run
        between = self.between if self.waits() else None
        if self.progress is not None:
            self.progress.trees += len(trees)
        return await grow_forest(trees, self.engine, run.branching, self.sampling, self.stop, self.soon, self.conclude, between)

    def waits(self) -> bool:
        """Whether some rule or the schedule wants to look at all trees between rounds."""
        return bool(self.names or self.expands or self.late)

    async def conclude(self, tree: Tree) -> None:
        """Grade a tree that has grown, and count it."""
        if self.progress is not None:
            self.progress.grown += 1
        await self.judge(tree)
        if self.progress is not None:
            self.progress.graded += 1

    async def judge(self, tree: Tree) -> None:
        """Grade what has ended."""
        with self.engine.grading():
            await grade(tree, self.rewards, self.decode, self.run.filter_overlong)

    async def between(self, grown: list[Tree]) -> None:
        """After a round: supply signals, prune by them, and let the schedule choose what to grow from."""
        run = self.run
        young = [tree for tree in grown if tree.rounds == 1 and self.expands]
        await together(self.judge(tree) for tree in young)
        last = run.branching.rounds
        asking = [tree for tree in grown if last is None or tree.rounds <= max(last, 1)]  # a schedule looks after the first
        if self.signals is not None and self.names and asking:
            await self.signals(asking, self.names)
        if self.signals is not None and self.late:
            await self.signals(grown, needed(*self.late))
            for tree in grown:
                prune(tree, self.late)
        if young:
            chosen, self.cursor["schedule"] = run.schedule.expand(young, self.cursor["schedule"])
            _choose(young, chosen)


def _choose(trees: Sequence[Tree], chosen: Sequence[set[int]]) -> None:
    """Note in every tree which of its graded paths the schedule lets nothing grow from."""
    for tree, ids in zip(trees, chosen, strict=True):
        tree.unexpanded = tuple(leaf.id for leaf in paths(tree) if leaf.verdict and leaf.id not in ids)
