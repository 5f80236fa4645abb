"""What a training has left in its folder, for Python: metrics as a table, the best model, trees to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ramulus.core import run_folder
from ramulus.learn.policy.model import Pretrained
from ramulus.look.viewer.show import Shown, show
from ramulus.run.config.resume import written_json
from ramulus.run.lock import reading
from ramulus.run.logbook import rows_of
from ramulus.run.trackers import flat_numbers

_HEADLINES = ("reward", "pass_rate", "eval/mean", "eval/greedy", "entropy", "length")


@dataclass(frozen=True)
class Result:
    """The folder of a run, read when asked: also of one that was stopped, or that the command line has trained.

    Example:
        >>> from ramulus import Result
        >>> Result("runs/none").metrics
        []
    """

    folder: Path
    stopped: str = ""  # who stopped it before its last step, and why; "" where nobody did

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def stages(self) -> dict[str, Path]:
        """The folder of each stage that has begun, by name; a run of one stage has it in its own."""
        inside = run_folder.stage_folders(self.folder)
        return {path.name.partition("-")[2]: path for path in inside} or {self.folder.name: self.folder}

    @property
    def metrics(self) -> list[dict[str, float]]:
        """A row for each step of the last stage; the seconds of its phases are seconds/NAME."""
        return self.metrics_of(list(self.stages)[-1])

    def metrics_of(self, stage: str) -> list[dict[str, float]]:
        """The rows of one stage."""
        path = self.stages[stage] / "metrics.jsonl"
        return [{"step": row["step"], **flat_numbers(row)} for row in rows_of(path) if "step" in row] if path.is_file() else []

    def frame(self, stage: str | None = None) -> Any:
        """The metrics as a pandas DataFrame with the step as its index. ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a DataFrame needs pandas: pip install pandas, or take `metrics`, a list of dicts") from error
        rows = self.metrics if stage is None else self.metrics_of(stage)
        return pandas.DataFrame(rows).set_index("step") if rows else pandas.DataFrame()

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json of a finished run: seconds, steps, and the final evaluation before and after; {} before that."""
        path = self.folder / "summary.json"
        return written_json(path) if path.is_file() else {}

    @property
    def best(self) -> dict[str, float] | None:
        """Step and score of the best evaluation of the last stage; None where nothing was evaluated."""
        best = (run_folder.newest_state(list(self.stages.values())[-1]) or {}).get("best")
        return best and {"step": best["step"], "score": best["score"]}

    def load(self, which: str | None = None) -> tuple[Any, Any]:
        """(model, tokenizer) of a checkpoint of the last stage, "best" or "last", loaded anew; None takes the best where there were evaluations."""
        folder, _ = run_folder.model_folder(self.folder, which or ("best" if self.best else "last"))
        with reading(folder.parent):
            return Pretrained(str(folder))()

    def trees(self, step: int | None = None, **how: Any) -> Shown:
        """The trees of a step, the last written one by default: pictures in a notebook, text elsewhere; `how` as in `ramulus.show`."""
        return show(self.folder, step=step, **how)

    def __repr__(self) -> str:
        rows = self.metrics
        parts = [f"{name} {text}" for name, text in _course(rows).items()]
        done = f"{int(rows[-1]['step'])} steps" if rows else "no step yet"
        return f"Result({str(self.folder)!r}: {', '.join([done, *parts])}{f'; stopped by {self.stopped}' if self.stopped else ''})"

    def _repr_html_(self) -> str:
        """The course of the headline numbers, and the final evaluation, as a table."""
        rows = self.metrics
        head = f"<b>{escape(str(self.folder))}</b>, {int(rows[-1]['step']) if rows else 0} steps"
        head += f"; stopped by {escape(self.stopped)}" if self.stopped else ""
        course = _course(rows)
        before, after = (_plain(self.summary.get(when)) for when in run_folder.WHEN)
        course |= {f"final evaluation: {name}": f"{before[name]:.3g} → {after[name]:.3g}" for name in after if name in before}
        cells = "".join(f"<tr><td style='text-align:left'>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in course.items())
        return f"<div>{head}<table>{cells}</table></div>"


def _course(rows: list[dict[str, float]]) -> dict[str, str]:
    """First and last value of the headline numbers."""
    columns = {name: [row[name] for row in rows if name in row] for name in _HEADLINES}
    return {name: f"{values[0]:.3g} → {values[-1]:.3g}" for name, values in columns.items() if values}


def _plain(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers of an evaluation."""
    return {name: value for name, value in (scores or {}).items() if isinstance(value, int | float)}
