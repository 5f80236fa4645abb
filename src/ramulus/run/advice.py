"""One line of advice where a run goes wrong in a known way: each rule is a function of the metrics so far, docs/troubleshooting.md lists them.

A rule answers what is wrong and what to do about it, or None. What it answers is said once, and again only after it had nothing to say for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from ramulus.run.callbacks import Callback, StepDone, TrainingBegun
from ramulus.run.config.recipe import Run
from ramulus.run.config.weighted import Weighted
from ramulus.run.logbook import rows_of

MetricsRow = Mapping[str, Any]
"""The metrics of one step, as in metrics.jsonl."""

FEW, MANY = 5, 10  # steps that a rule looks at, at either end of the run
SEEN = 20  # answers before anything is said of them
PAGE = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Facts:
    """What does not change from step to step."""

    run: Run
    problems: int  # to train on
    ends: tuple[str, ...] = ()  # the tokens that end an answer


Rule = Callable[[Sequence[MetricsRow], Facts], str | None]
"""(rows of the first steps and of the last ones, in order; facts) -> what is wrong and the remedy."""


def more_trees_than_problems(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """A step visits a problem more than once; known before the first step."""
    wanted = max(facts.run.schedule.asked({}), rows[-1].get("wanted", 0) if rows else 0)
    if wanted <= facts.problems:
        return None
    return (
        f"a step takes {wanted} trees, but there are only {facts.problems} problems, so that it grows several of one problem: take fewer "
        "(schedule.prompts), or bring more problems"
    )


def more_minibatches_than_trees(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """Updates without a tree; known before the first step."""
    wanted = facts.run.schedule.asked({})
    if not 0 < wanted < facts.run.minibatches:
        return None
    return (
        f"minibatches={facts.run.minibatches}, but a step takes {wanted} trees, and a minibatch is whole trees: lower minibatches, or raise "
        "schedule.prompts"
    )


def everything_truncated(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """Answers hardly ever end by themselves."""
    recent = rows[-FEW:]
    paths = sum(row.get("paths", 0) for row in recent)
    cut = round(sum(row.get("truncated", 0.0) * row.get("paths", 0) for row in recent))
    if paths < SEEN or cut <= 0.95 * paths:
        return None
    ends = f", or look whether this model ends its turns with {' or '.join(facts.ends)}, which ends an answer here" if facts.ends else ""
    return f"{cut} of {paths} answers were cut off at response_limit={facts.run.response_limit} and did not end by themselves: raise it{ends}"


def no_answer_found(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """The reward looks for an answer and finds none."""
    answered = [row for row in rows[-FEW:] if "answered" in row]
    graded = sum(row["paths"] for row in answered)
    answers = round(sum(row["answered"] * row["paths"] for row in answered))
    if graded < SEEN or answers > 0.01 * graded or everything_truncated(rows, facts):
        return None
    return (
        f"an answer was found in {answers} of {graded} responses: the reward ({names_of(facts.run)}) reads one in a form that the model does not "
        "write; ask for that form in the prompt (template=..., system=...), show it there (examples=...), or look "
        f"elsewhere{field_of_extract(facts.run)}"
    )


def no_group_mixed(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """The paths of each tree earn the same, so that comparing them teaches nothing."""
    steps = [row for row in rows[-3:] if "mixed" in row]
    if len(steps) < 3 or any(row["mixed"] for row in steps) or everything_truncated(rows, facts) or no_answer_found(rows, facts):
        return None
    passed = mean(row.get("pass_rate", 0.5) for row in steps)
    if passed > 0.95:
        remedy = "they are all right: the problems are too easy, take harder ones"
    elif passed < 0.05:
        remedy = "they are all wrong: take easier problems, more paths a tree, or show solutions first (sft_then_grpo, demonstrations)"
    else:
        remedy = "take more paths a tree, a higher temperature, or a reward that tells answers apart"
    return f"in {len(steps)} steps no tree had paths that earned different rewards, so that nothing was learned from comparing them; {remedy}"


def one_path_a_tree(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """An advantage that compares paths has nothing to compare."""
    steps = [row for row in rows[-3:] if row.get("paths")]
    if len(steps) < 3 or any(row["paths"] > row.get("trees", 0) or row["updates"] for row in steps):
        return None
    return "each tree has one path, and the advantage compares the paths of a tree: nothing is learned; take more (branching.n=8, say)"


def entropy_collapsing(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """The sampler hardly varies any more, though the problems are not solved."""
    steps = [row for row in rows if row.get("paths")]
    entropies = [row["entropy"] for row in steps if "entropy" in row]  # where nothing was learned nobody looked
    if len(steps) < MANY or len(entropies) < 6:
        return None
    before, now = mean(entropies[:3]), mean(entropies[-3:])
    alike = mean(row.get("mixed", 0.0) for row in steps[-FEW:]) < 0.2
    solved = is_solved(steps)
    if now > 0.1 * before or not alike or solved:
        return None
    return (
        f"the entropy of the sampler fell from {before:.2g} to {now:.2g} nats a token, and hardly a tree has paths that differ: lower optimizer.lr, "
        "raise the upper clip (DualClip(0.2, 0.28, ...)) or give mix.entropy_bonus; going on from an earlier checkpoint saves what was lost"
    )


def is_solved(rows: Sequence[MetricsRow]) -> bool:
    """Whether the last steps had hardly a wrong path; where no reward calls one so, whether their reward is the best that there was."""
    if all("pass_rate" in row for row in rows[-FEW:]):
        return mean(row["pass_rate"] for row in rows[-FEW:]) > 0.95
    return mean(row["reward"] for row in rows[-FEW:]) >= max(row["reward"] for row in rows) - 1e-9


def mismatch_growing(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """The log-probs that sampler and learner give the same tokens drift apart."""
    for name, floor, words in (("mismatch_max", 0.05, "by up to"), ("mismatch", 0.01, "on average by")):
        mismatches = [row[name] for row in rows if row.get("paths") and row.get(name)]
        before, now = (mismatches[0], median(mismatches[-FEW:])) if len(mismatches) > FEW else (0.0, 0.0)
        if now >= max(floor, 5 * before) or (name == "mismatch" and now >= 0.3):
            return (
                f"sampler and learner disagree on the same tokens, {words} {now:.2g} in log-probability, {before:.2g} at first: sample "
                "in float32 (engine.precision=float32) where it is less, weigh tokens by ImportanceWeight or IcePop, lower optimizer.lr where "
                "weights explode, and with an engine elsewhere look whether it takes new weights"
            )
    return None


def gradient_always_clipped(rows: Sequence[MetricsRow], facts: Facts) -> str | None:
    """Each of the last updates was cut to optimizer.clip."""
    norms = [row["grad_norm"] for row in rows if row.get("paths") and "grad_norm" in row][-MANY:]
    clip = facts.run.optimizer.clip
    if len(norms) < MANY or min(norms) <= clip:
        return None
    return (
        f"the gradient was clipped in each of the last {MANY} steps: its norm was {median(norms):.2g} in the middle, optimizer.clip is {clip:g}; "
        f"set it near {median(norms):.2g}, so that it stops outliers alone, and lower optimizer.lr if the reward wavers"
    )


RULES: tuple[Rule, ...] = (
    more_trees_than_problems, more_minibatches_than_trees, everything_truncated, no_answer_found, no_group_mixed, one_path_a_tree,
    entropy_collapsing, mismatch_growing, gradient_always_clipped,
)  # fmt: skip


@dataclass
class Advice(Callback):
    """What the rules have to say of a run, each once until it clears: until the rule had nothing to say in `FEW` steps."""

    facts: Facts
    rows: list[MetricsRow] = field(default_factory=list)  # of the first steps and of the last ones
    quiet: dict[str, int] = field(default_factory=dict)  # rules that have spoken: steps since they had something to say

    def on_begin(self, event: TrainingBegun) -> None:
        """Before a run's first step say what is known by then; take in the rows of one that goes on: what was said then is not said again."""
        first, rows = self.spoken(), list(rows_of(event.run.folder / "metrics.jsonl"))
        for text in first if not rows else ():
            event.say(f"{event.run.name}: {text}")
        for row in rows:
            self(row)

    def on_step(self, event: StepDone) -> None:
        """Print what the rules say after this step and had not said before."""
        for text in self(event.metrics):
            event.say(f"{event.run.name}: step {event.step}: {text}")

    def __call__(self, row: MetricsRow) -> list[str]:
        """What is new after a step."""
        self.rows.append(row)
        if len(self.rows) > 2 * MANY:
            del self.rows[MANY]
        return self.spoken()

    def spoken(self) -> list[str]:
        """The words of each rule that was silent before."""
        new = []
        for rule in RULES:
            name, text = rule.__name__, rule(self.rows, self.facts)
            if text is not None:
                new += [] if name in self.quiet else [f"{text} ({PAGE}, {name})"]
                self.quiet[name] = 0
            elif name in self.quiet:
                self.quiet[name] += 1
                if self.quiet[name] >= FEW:
                    del self.quiet[name]
        return new


def field_of_extract(run: Run) -> str:
    """The field that says where a reward looks for an answer, in brackets; "" where no reward has one."""
    parts = run.rewards if isinstance(run.rewards, tuple) else (run.rewards,)
    for number, part in enumerate(parts):
        within = ".reward" if isinstance(part, Weighted) else ""
        if hasattr(part.reward if isinstance(part, Weighted) else part, "extract"):
            return f" (rewards{f'.{number}' if isinstance(run.rewards, tuple) else ''}{within}.extract=number)"
    return ""


def names_of(run: Run) -> str:
    """The rewards of a run by their names."""
    return ", ".join(name for _, _, name in run.weighted())
