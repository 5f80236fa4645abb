"""The loop: grow, score, credit, pack, accumulate, update, write, load. The trainer owns no transformation of data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ramulus.core import store
from ramulus.core.json_object import finite_text
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Engine, Live, Sampling, Weights
from ramulus.learn.batch.score_row import ROW, nodes_of
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.gate import openness
from ramulus.learn.objective.gauges import counts, gauges
from ramulus.learn.packing.annotate import annotate, annotate_ratio
from ramulus.learn.packing.pack import pack
from ramulus.learn.packing.weights import idle_entropy
from ramulus.learn.policy.learner import Evaluated, Learner
from ramulus.learn.policy.scoring import score
from ramulus.look.cost.ledger import decoding
from ramulus.look.evaluation.evaluate import evaluate
from ramulus.native.memory import OutOfMemory
from ramulus.native.processors import device_of
from ramulus.run.ahead import AheadRollouts, ripe_to_json
from ramulus.run.callbacks import CheckpointSaved, EvaluationDone, Listeners, StepDone
from ramulus.run.checkpoint import Generators
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text
from ramulus.run.evaluation.final_evaluation import is_better
from ramulus.run.interrupt import Interrupt, Stopped
from ramulus.run.logbook import Logbook
from ramulus.run.machine import Machine
from ramulus.run.memory.step import USUAL_TOKENS
from ramulus.run.minibatch import Minibatch, has_signal, minibatches, step_stats
from ramulus.run.numerics import numerics
from ramulus.run.rollouts import START, Cursor, Rollout
from ramulus.run.saving import Saving, failure_of
from ramulus.run.step_progress import StepProgress
from ramulus.run.step_statistics import StepStatistics, loss

UNWRITTEN = "unwritten trees"  # in a pending step: the lines of a file that could not be written


@dataclass
class TrainerState:
    """What lasts from step to step beside the weights, in every checkpoint."""

    step: int = 0  # steps done
    cursor: Cursor = field(default_factory=lambda: dict(START))
    best: dict[str, Any] | None = None  # step and score of the best evaluation, and what was scored: correct answers (mean), or the reward
    mix: dict[str, Any] = field(default_factory=dict)  # of the gate
    pending: dict[str, Any] | None = None  # metrics of a step that is done but not yet evaluated and written
    seconds: float = 0.0  # of work so far, over all resumptions
    tasks: str = ""  # digest of the tasks
    lowered: dict[str, int] = field(default_factory=dict)  # tokens_per_batch as stated, and what memory held of it

    @property
    def steps_logged(self) -> int:
        """Steps that have a row in metrics.jsonl."""
        return self.step - (self.pending is not None)

    def plain(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint."""
        return vars(self) | {"cursor": ripe_to_json(self.cursor)}


class Clock:
    """Seconds by phase, and since it was made; `earlier` phases count in both. Phases must not overlap."""

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(earlier or {})
        self.start = time.monotonic() - sum(self.seconds.values())
        self.now = ""  # the phase under way

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, self.now = time.monotonic(), phase
        try:
            yield
        finally:
            self.now = ""
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def move(self, seconds: float, phase: str, part: str) -> None:
        """Count some seconds of a phase as those of a part of it that has a name of its own."""
        self.seconds[phase] -= seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def rest(self) -> float:
        """Seconds since it was made that are of no phase."""
        return max(time.monotonic() - self.start - math.fsum(self.seconds.values()), 0.0)

    def step(self) -> dict[str, float]:
        """The seconds of all phases, those of none as `idle`, and their sum as `step`."""
        parts = self.seconds | {"idle": self.seconds.get("idle", 0.0) + self.rest()}
        return parts | {"step": math.fsum(parts.values())}


@dataclass
class Trainer:
    """One stage of training: the parts are built by `stage.py`."""

    run: Run
    learner: Learner
    engine: Engine
    rollouts: AheadRollouts
    evals: Sequence[Task]
    logbook: Logbook
    interrupt: Interrupt
    state: TrainerState
    whole: bool = True  # weights and state belong together: not in the middle of an update
    listeners: Listeners = field(default_factory=Listeners)
    grown: list[Tree] = field(default_factory=list)  # of the last step, for those who listen
    scored: int = ROW  # tokens of a row of which log-probs are computed again
    late: dict[str, float] = field(default_factory=dict)  # seconds of what came after the last line of metrics
    rest: Callable[[], Awaitable[None]] | None = None  # called when nothing is sampled until the next load

    def __post_init__(self) -> None:
        self.machine = Machine(device_of(self.run.device))
        self.begins, tokens = self.run.begins, self.run.tokens_per_batch
        self.stated: int = USUAL_TOKENS if tokens == "auto" else tokens
        self.tokens = self.state.lowered.get(str(self.stated), self.stated)
        self.numerics = numerics(device_of(self.run.device), self.engine.about)
        self.generators = Generators.now()  # where the last whole step, or evaluation, left them
        self.progress = self.rollouts.progress = StepProgress(self.engine.counters)
        self.logbook.follow(self.progress)
        self.saving = Saving(self.run, self.checkpointed)

    async def train(self) -> None:
        """All steps that are left; a stop or an error in growing or evaluating saves what is done, then is raised."""
        try:
            if self.state.pending is not None:
                await self.close_step()
            while self.state.step < self.run.steps:
                self.state.pending = await self.step()
                await self.close_step()
                self.interrupt.check()
                if self.state.step < self.run.steps:
                    self.listeners.check()
            await self.save()
            await self.saving.settled()
        except BaseException as error:
            await self.rollouts.abandon()
            await self.save_after(error)
            raise
        finally:
            self.saving.close()

    async def save_after(self, error: BaseException) -> None:
        """Keep what is done although something went wrong; where that fails too, the error says so, and a stop becomes an OSError."""
        unsaved = await failure_of(self.saving.settled)
        if self.whole and self.state.step > 0:
            self.generators.restore()  # what was abandoned may have drawn from them, and is done again
            unsaved = await failure_of(self.save) or await failure_of(self.saving.settled)
        if unsaved is not None and (not isinstance(error, Exception) or isinstance(error, Stopped)):
            raise unsaved
        if unsaved is not None and str(unsaved) != str(error):
            error.add_note(str(unsaved))

    async def step(self) -> dict[str, Any]:
        """One step, from drawn tasks to new weights in the engine; returns its metrics.

        Its `seconds` are those of `step` and of its phases, which do not overlap and add up to it. `grow` is what growing took but for
        `grade`, the time in which nothing but grades was awaited; `idle` is the rest. `log` and `save` are those of the step before.
        """
        run, clock, number, cpu = self.run, Clock(self.late), self.state.step + 1, time.process_time()
        counters = dict(self.engine.counters())
        self.progress.begin(number, lambda: clock.now)
        with clock("grow"):
            rollout, cursor = await self.interrupt.abandonable(self.rollouts.get(number, self.state.cursor))
        clock.move(rollout.grading, "grow", "grade")
        if self.rest is not None:
            with clock("load"):
                await self.rest()
        trees = rollout.kept
        with clock("score"):
            await self.score(rollout)
        with clock("credit"):
            credits = run.mix.credit(trees) if trees else []
            every, gate = run.mix.gates(rollout.grown, self.state.mix)  # a gate learns from trees that are dropped, too
            gates = [every[place] for place in rollout.places] if every is not None else None
        with clock("pack"):
            cut = minibatches(trees, credits, gates, run.mix, run.minibatches)
        statistics = await self.learn(cut, number, clock)

        def learned(rollout: Rollout, cursor: Cursor) -> dict[str, Any]:
            """The step is done but for its evaluation and its row: what it was, and where the next one begins."""
            with clock("ledger"):
                metrics = rollout.metrics(statistics.fates) | decoding(counters, self.engine.counters()) | statistics.metrics() | openness(gates)
                metrics |= differences(metrics) | self.machine.read()
            self.state.step, self.state.cursor, self.state.mix, self.whole, self.late = number, cursor, gate, True, {}
            self.grown = rollout.grown if self.listeners.callbacks else []
            self.generators = Generators.now()
            return metrics | {"cpu_seconds": time.process_time() - cpu, "seconds": clock.step()}

        try:
            with clock("write"):
                unwritten = self.write_trees(rollout.grown, cut, number)
            loading = self.rollouts.renewed(rollout, cursor, self.engine, partial(hand_over, self.learner, self.engine), clock)
            rollout, cursor = await self.interrupt.ending(loading)
        except BaseException:  # its update is made, whatever goes wrong: whoever goes on has it evaluated and written, with what is ripe
            self.state.pending = learned(*self.rollouts.with_ripe(rollout, cursor))
            raise
        return learned(rollout, cursor) | unwritten

    async def score(self, rollout: Rollout) -> None:
        """Write into the trees what the mix reads of them: log-probs by the learner, and signals."""
        mix, signals = self.run.mix, self.rollouts.signals
        known = signals.context.rides if signals else ()
        self.scored = await score(self.learner, rollout.kept, mix.columns - self.begins, known=known, tokens=self.scored)
        if signals:
            await signals.before_update(mix, rollout.grown, rollout.kept)

    async def learn(self, cut: Sequence[Minibatch], number: int, clock: Clock) -> StepStatistics:
        """One optimizer step for each minibatch; those without signal change nothing."""
        run, version = self.run, self.learner.version  # whose tokens these weights should give the recorded log-probs
        statistics = StepStatistics(len(cut), run.optimizer.rate(number, run.steps))
        with clock("pack"):
            stats = step_stats(cut, run.mix)
        for part in cut:
            with clock("pack"):
                batches = self.packed(part, stats)
                learns = any(has_signal(run.mix, batch) for batch in batches)
            with clock("ledger"):
                statistics.add_fates(part.selection, run.mix, learns)
            if not learns:
                statistics.empty += 1
                continue
            with clock("update"):
                batches, evaluated = await self.accumulate(part, stats, self.progress.taken(batches))
            with clock("gauges"):
                self.read(statistics, part, batches, evaluated, version)
                if self.writes(number):
                    nodes = nodes_of(part.trees)
                    for batch, now in zip(batches, evaluated, strict=True):
                        annotate_ratio(nodes, batch, now.tempered)
            with clock("update"):
                self.whole = False  # until the step is over: what went wrong before this has changed nothing that lasts
                statistics.add_update(await self.learner.update(statistics.rate))
        return statistics

    def packed(self, part: Minibatch, stats: dict[str, float]) -> list[TreeBatch]:
        """The rows of a minibatch."""
        return pack(part.trees, part.credits, self.run.mix, self.tokens, stats=stats, selection=part.selection, begins=self.begins)

    async def accumulate(
        self, part: Minibatch, stats: dict[str, float], batches: list[TreeBatch]
    ) -> tuple[list[TreeBatch], list[Evaluated]]:
        """Add the gradient of a minibatch; where memory does not hold its rows, all of it again in rows of half as many tokens, and so ever after.

        Raises OutOfMemory for a row that is one path.
        """
        while True:
            try:
                evaluated = await self.learner.accumulate(self.run.mix, batches)
                return [batch.begun(now.tempered, now.plain) for batch, now in zip(batches, evaluated, strict=True)], evaluated
            except OutOfMemory:
                largest = max(len(batch.token) for batch in batches)
                longest = max(int(batch.position.max()) + 1 for batch in batches)
                if largest <= longest:
                    raise
            self.tokens = max(largest // 2, longest)
            warnings.warn(
                f"memory did not hold {largest:,} tokens going through {self.run.name}'s model at once: from here on it is at most {self.tokens:,}; "
                "nothing is lost",
                RuntimeWarning,
                stacklevel=2,
            )
            self.state.lowered = {str(self.stated): self.tokens}
            batches = self.packed(part, stats)

    def read(
        self, statistics: StepStatistics, part: Minibatch, batches: Sequence[TreeBatch], evaluated: Sequence[Evaluated], version: int
    ) -> None:
        """What the rows of a minibatch have shown, and the paths that were left out of them."""
        statistics.rows.append(idle_entropy(part.trees, part.selection, self.run.mix))
        for batch, (tempered, plain, entropy, values) in zip(batches, evaluated, strict=True):
            evaluation = (self.run.mix, tempered, plain, entropy, batch)
            statistics.add_row(gauges(*evaluation, version, values), loss(*evaluation, values), counts(batch))

    def writes(self, number: int) -> bool:
        """Whether the trees of a step are kept."""
        return bool(self.run.trees_every) and number % self.run.trees_every == 0

    def write_trees(self, grown: list[Tree], cut: Sequence[Minibatch], number: int) -> dict[str, list[str]]:
        """The step's trees, with their rewards, verdicts and credit, in a file of its own; where that fails their lines, for `close_step`."""
        if not self.writes(number):
            return {}
        for part in cut:
            annotate(part.trees, self.run.mix, part.credits, part.selection)
        try:
            store.write(self.trees_of(number), grown)
        except OSError:
            return {UNWRITTEN: [store.dump(tree).decode() for tree in grown]}
        return {}

    def trees_of(self, number: int) -> Path:
        """The file of a step's trees."""
        return self.run.folder / "trees" / f"{number:06d}.jsonl"

    async def close_step(self) -> None:
        """Evaluate if it is time, write the metrics, save if it is time. What fails before the metrics are written leaves the step pending."""
        run, step, metrics, clock = self.run, self.state.step, dict(self.state.pending or {}), Clock()
        if self.saving.under_way is not None:
            with clock("save"):
                await self.saving.settled()
        if lines := metrics.pop(UNWRITTEN, None):
            replace_text(self.trees_of(step), "".join(lines))
        best, improved = self.state.best, False
        if self.evals and (step == run.steps or (run.eval_every and step % run.eval_every == 0)):
            sampled = self.engine.counters()["sampled"]
            self.progress.begin(step, lambda: clock.now, len(self.evals) * (run.eval_samples + 1))
            with clock("eval"):
                scores = await self.interrupt.abandonable(self.evaluate(step))
            metrics |= scores | {"eval_sampled": self.engine.counters()["sampled"] - sampled}
            kind = "mean" if "eval/mean" in scores else "reward"
            improved = is_better(kind, scores[f"eval/{kind}"], best)
            best = {"step": step, "score": scores[f"eval/{kind}"], "of": kind} if improved else best
        metrics["seconds"] = metrics["seconds"] | {name: spent for name, spent in clock.seconds.items() if name == "eval"}
        seconds = self.state.seconds + sum(metrics["seconds"].get(name, 0.0) for name in ("step", "eval"))
        metrics["seconds"] = metrics["seconds"] | {"mean": seconds / step}
        with clock("log"):
            self.logbook.write(step, metrics)
            self.state.pending, self.state.best, self.state.seconds = None, best, seconds
            self.generators = Generators.now()
            self.logbook.show(step, metrics)
            self.listeners.tell(lambda it: it.on_step, StepDone(run, step, self.logbook.say, metrics, self.grown, self.rollouts.decode))
            self.grown = []
        if improved or step % run.save_every == 0:
            with clock("save"):
                await self.save()
        late = {name: clock.seconds[name] for name in ("log", "save") if name in clock.seconds}
        self.late = late | {"idle": clock.rest()}

    async def evaluate(self, step: int) -> dict[str, float]:
        """Held-out reward, and accuracy where a reward calls answers correct, over samples and greedy; every answer goes to evals/STEP.json."""
        run, sampling = self.run, Sampling(self.run.response_limit)
        scores = await evaluate(
            self.engine,
            self.evals,
            run.weighted(),
            self.rollouts.decode,
            self.rollouts.stop,
            sampling,
            run.eval_samples,
            True,
            run.seed,
            on_graded=self.progress.count,
        )
        await self.engine.reset()  # a resumed run does not repeat this evaluation: leave no trace of it
        path = run.folder / "evals" / f"{step:06d}.json"
        replace_text(path, finite_text(scores))
        names = {f"mean@{run.eval_samples}": "mean", "greedy": "greedy", "reward": "reward", "greedy_reward": "greedy_reward", "length": "length"}
        brief = {f"eval/{name}": scores[measure] for measure, name in names.items() if measure in scores}
        self.listeners.tell(lambda it: it.on_evaluation, EvaluationDone(run, step, self.logbook.say, brief, path))
        return brief

    async def save(self) -> None:
        """Begin a checkpoint of the last whole step, once the one before is in its place."""
        beside = {"random": self.generators.plain(), "numerics": self.numerics}
        best = int(self.state.best["step"]) if self.state.best else None
        await self.saving.save(self.state.step, self.learner.save, self.state.plain() | beside, best, self.logbook.keep)

    def checkpointed(self, step: int, folder: Path) -> None:
        """Tell the listeners of a checkpoint."""
        self.listeners.tell(lambda it: it.on_checkpoint, CheckpointSaved(self.run, step, self.logbook.say, folder))


async def hand_over(learner: Learner, engine: Engine) -> None:
    """Load the learner's weights into the engine: in place where it reads the learner's own parameters, else as tensors."""
    both = learner.features & engine.features
    if "in_place" in both:
        weights: Weights = None
    elif "live" in both:
        parameters = await learner.weights(live=True)
        assert isinstance(parameters, Mapping)
        weights = Live(parameters, lambda: learner.version)
    else:
        weights = await learner.weights()
    await engine.load(weights, learner.version)


def differences(metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens that follow from two other counts: sampled by the engine but in no tree, and trained once more in another row of a cut tree."""
    held = metrics["sampled"] - metrics["sampled_before"] + metrics["sampled_ahead"]
    once = metrics["trained_policy"] + metrics["trained_expert"]
    return {"thrown_away": metrics["engine_sampled"] - held, "repeated": metrics["trained"] - once}
