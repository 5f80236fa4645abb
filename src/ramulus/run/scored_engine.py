"""Entropies and temperatures of tokens whose engine records neither: the learner looks at what was sampled."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable, Sequence

import torch

from ramulus.core.recipe_part import RecipePart, with_defaults
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.around import AroundEngine
from ramulus.engine.engine import Engine, Request, Segment, entropy_rule
from ramulus.learn.batch.score_row import score_rows
from ramulus.learn.policy.learner import Learner

_Batch = tuple[Sequence[Request], Sequence[Segment], "asyncio.Future[None]"]


def with_entropies(engine: Engine, learner: Learner, parts: Iterable[object]) -> tuple[Engine, bool]:
    """The engine, with entropies by the learner where some part of a recipe reads them and the engine records none; whether that is so."""
    lacking = "entropy" not in engine.features and any("entropy" in with_defaults(part, RecipePart).records for part in parts)
    return ScoredEngine(engine, learner) if lacking else engine, lacking


class ScoredEngine(AroundEngine):
    """An engine without the feature "entropy", given it by passes of a learner that has the same weights.

    Entropies are the learner's, so they differ from those that the engine drew from by its rounding; the temperatures of a rule follow from them.
    What is sampled while a pass runs shares the next one. ValueError for a rule that cannot be asked about entropies.
    """

    def __init__(self, engine: Engine, learner: Learner) -> None:
        super().__init__(engine)
        self.learner = learner
        self.features, self.about = engine.features | {"entropy"}, f"{engine.about}; entropies by the learner"
        self.waiting, self.passing = list[_Batch](), list[_Batch]()  # for the next pass, and in the present one
        self.task: asyncio.Task[None] | None = None  # whose callers may be cancelled, all but the last

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each, with its entropies."""
        for request in requests:
            rule = request.sampling.temperature
            if callable(rule) and entropy_rule(rule) is None:
                raise ValueError(f"{self.engine.about} does not record the temperatures of {rule}: sample with engine=Local()")
        segments = await self.engine.sample(requests)
        if segments:
            scored = asyncio.get_running_loop().create_future()
            self.waiting.append((requests, segments, scored))
            if self.task is None or self.task.done():
                self.task = asyncio.create_task(self._score_all())
            try:
                await scored
            except asyncio.CancelledError:
                if all(other.done() for *_, other in (*self.passing, *self.waiting)):
                    self.task.cancel()
                raise
        return segments

    async def _score_all(self) -> None:
        """Passes until nobody waits for one."""
        try:
            while self.waiting:
                self.passing, self.waiting = [batch for batch in self.waiting if not batch[-1].done()], []
                try:
                    await self._score([(r, s) for requests, segments, _ in self.passing for r, s in zip(requests, segments, strict=True)])
                except Exception as error:  # whoever waits is told
                    for scored in (scored for *_, scored in self.passing if not scored.done()):
                        scored.set_exception(error)
                for scored in (scored for *_, scored in self.passing if not scored.done()):
                    scored.set_result(None)
        finally:
            for *_, scored in (*self.passing, *self.waiting):  # a pass was broken off
                scored.cancel()
            self.passing, self.waiting = [], []

    async def _score(self, sampled: Sequence[tuple[Request, Segment]]) -> None:
        """One pass over all of them; requests that share a prefix are one tree."""
        trees: dict[tuple[int, ...], Tree] = {}
        places: dict[tuple[int, ...], int] = {}
        of_node: dict[tuple[int, int], tuple[Request, Segment]] = {}
        for request, segment in sampled:
            prefix = tuple(request.prefix)
            tree = trees.setdefault(prefix, Tree.plant(Task("", prefix, "")))
            node = tree.add(tree.root, segment.tokens, Author.POLICY)
            of_node[places.setdefault(prefix, len(places)), node.id] = request, segment
        rows = score_rows(list(trees.values()))
        for row, columns in zip(rows, await self.learner.score(rows, ["entropy"]), strict=True):
            values = columns["entropy"].float().cpu()
            for tree_number, number, start, stop in row.spans:
                if (tree_number, number) in of_node:
                    request, segment = of_node[tree_number, number]
                    segment.entropy = array("f", values[start:stop].tolist())
                    _fill_temperature(request, segment, values[start:stop])


def _fill_temperature(request: Request, segment: Segment, entropy: torch.Tensor) -> None:
    """Write down the temperatures that a rule gave, where the engine has not."""
    rule = entropy_rule(request.sampling.temperature)
    if rule is not None and segment.temperature is None:
        segment.temperature = array("f", rule.of_entropy(entropy).tolist())
