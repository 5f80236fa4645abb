"""The final evaluation: one model before the first step and after the last, on problems that training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Decode, Engine, Sampling
from ramulus.grow.stop import Stop
from ramulus.look.evaluation.evaluate import evaluate
from ramulus.look.evaluation.scoreboard import shown_number
from ramulus.look.progress import Bar
from ramulus.run.config.recipe import FinalEvaluation, Run
from ramulus.run.step_progress import StepProgress, narrated

ModelScores = dict[str, Any]
COOLER = " at temperature "  # in the name of a score at another temperature than 1
_LEFT_OUT = ("intervals", "answers", "problems", "samples", "temperature", "seconds", "step", "cooler")


def answer_count(how: FinalEvaluation, problems: int, start: bool) -> int:
    """How many answers are sampled."""
    return problems * (how.samples * (1 + (len(how.temperatures) if start else 0)) + 1)


async def evaluate_model(
    run: Run, how: FinalEvaluation, engine: Engine, tasks: Sequence[Task], decode: Decode, stop: Stop, start: bool, console: Console
) -> ModelScores:
    """mean@k and pass@k at temperature 1, greedy, and for the starting model mean@k at lower temperatures; with intervals and answers.

    A terminal shows how many of the answers are there, and a line tells it now and then elsewhere.
    """
    total, progress = answer_count(how, len(tasks), start), StepProgress(engine.counters)
    progress.begin(0, lambda: "eval", total)
    with Bar(console, "evaluating", total, "answers") as bar, narrated(progress, console, bar.disable):

        def count(tree: Tree) -> None:
            progress.count(tree)
            bar.more(len(tree.leaves()))

        async def scored(temperature: float, greedy: bool) -> ModelScores:
            sampling = Sampling(run.response_limit, temperature)
            arguments = engine, tasks, run.weighted(), decode, stop, sampling, how.samples, greedy, run.seed
            return await evaluate(*arguments, on_graded=count)

        scores_at_1 = await scored(1.0, True)
        cooler = {temperature: await scored(temperature, False) for temperature in how.temperatures} if start else {}
    return scores_at_1 | {"cooler": {str(temperature): other[measure(other, how.samples)] for temperature, other in cooler.items()}}


def measure(model_scores: ModelScores, samples: int) -> str:
    """What an evaluation is judged by: mean@k, or the mean reward where no reward says what is correct."""
    return f"mean@{samples}" if f"mean@{samples}" in model_scores else "reward"


def is_better(kind: str, score: float, best: Mapping[str, Any] | None) -> bool:
    """Whether an evaluation is the best so far: by correct answers where any of the two was told, and never by one measure against another."""
    if best is None or best.get("of", kind) == kind:
        return best is None or score > best["score"]
    return kind == "mean"


def scores(measured: ModelScores, samples: int) -> ModelScores:
    """What summary.json says of one model: accuracies between 0 and 1, lengths in tokens, 95 % intervals."""
    plain = {name: value for name, value in measured.items() if name not in _LEFT_OUT}
    cooler = {f"{measure(measured, samples)}{COOLER}{temperature}": value for temperature, value in measured["cooler"].items()}
    return plain | cooler | {"intervals": measured["intervals"]}


def table(before: ModelScores, after: ModelScores, samples: int, problems: int, start: str, end: str) -> Table:
    """Before, after and gain, with the starting model at lower temperatures: what is more than sharpening.

    `samples` are those of the evaluation after; one before with other numbers (they were changed at a resume) is shown as far as it goes.
    """
    k, name = samples, measure(after, samples)
    unit = "accuracy in %" if name != "reward" else "mean reward"
    drawn = Table(title=f"{problems} held-out problems, {unit}, ± half a 95 % interval", title_justify="left")
    drawn.add_column("")
    for head in (f"before ({start})", f"after ({end})", "gain"):
        drawn.add_column(head, justify="right")
    rows = {f"{name} at temperature 1": name, "greedy": "greedy" if "greedy" in after else "greedy_reward", f"pass@{k}": f"pass@{k}"}
    for label, row in rows.items():
        if row in after:
            was = (_shown(before, row), shown_number(row, after[row] - before[row], "+")) if row in before else ("–", "")
            drawn.add_row(label, was[0], _shown(after, row), was[1])
    drawn.add_section()
    for label, value in before.items():
        if COOLER in label:
            drawn.add_row(label, shown_number(label.partition(COOLER)[0], value), "", "")
    return drawn


def _shown(measured: ModelScores, name: str) -> str:
    """The value with half the width of its 95 % interval."""
    low, high = measured["intervals"].get(name, (measured[name],) * 2)
    return f"{shown_number(name, measured[name])} ± {shown_number(name, (high - low) / 2)}"
