"""Callbacks: whoever wants to know of steps, evaluations and checkpoints of a run that is trained from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ramulus.core.tree import Tree
from ramulus.engine.engine import Decode
from ramulus.run.checkpoint import Generators
from ramulus.run.config.recipe import Run
from ramulus.run.interrupt import Stopped

Say = Callable[[str], None]
"""Shows a line to people, above the progress bar where there is one."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: of which stage, after how many steps, and what shows a line to people."""

    run: Run
    step: int
    say: Say


@dataclass(frozen=True)
class TrainingBegun(Event):
    """A stage begins, or goes on after `step` steps."""


@dataclass(frozen=True)
class StepDone(Event):
    """A step is done and its row written. `trees` is empty where a resumed run finishes a step that it had trained before.

    Example:
        >>> from ramulus import StepDone
        >>> from ramulus.recipes import grpo
        >>> StepDone(grpo.recipe(), 3, print, {"reward": 0.5}).metrics["reward"]
        0.5
    """

    metrics: Mapping[str, Any]  # the row of metrics.jsonl
    trees: Sequence[Tree] = ()  # all that were grown, with rewards; valid during the call
    decode: Decode = str  # text of tokens


@dataclass(frozen=True)
class EvaluationDone(Event):
    """Held-out problems were answered.

    Example:
        >>> from ramulus import EvaluationDone
        >>> from ramulus.recipes import grpo
        >>> EvaluationDone(grpo.recipe(), 3, print, {"eval/mean": 0.25}).scores
        {'eval/mean': 0.25}
    """

    scores: Mapping[str, Any]
    file: Path | None = None  # JSON, with every answer
    when: str = "during"  # during, before or after training


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is on the disk; `folder` has the model in `model/`.

    Example:
        >>> from pathlib import Path
        >>> from ramulus import CheckpointSaved
        >>> from ramulus.recipes import grpo
        >>> CheckpointSaved(grpo.recipe(), 50, print, Path("runs/grpo/checkpoints/step-000050")).folder.name
        'step-000050'
    """

    folder: Path


@dataclass(frozen=True)
class TrainingEnded(Event):
    """A stage has ended, by its last step or because it was stopped; no other event of it follows."""


class StopTraining(Exception):
    """Raised by a callback: the run is saved after this step and stops; what is said is the reason.

    Example:
        >>> from ramulus import StopTraining
        >>> str(StopTraining("good enough"))
        'good enough'
    """


class Callback:
    """Override what you want to know of. Called between steps, one callback after the other, and waited for.

    An exception is said, once until the method works again, and changes nothing in the run; `StopTraining` saves the run and stops it.

    Example:
        >>> from ramulus import Callback, StopTraining
        >>> class Enough(Callback):
        ...     def on_step(self, event):
        ...         if event.metrics["reward"] > 0.9:
        ...             raise StopTraining("the reward is above 0.9")
        >>> Enough().on_checkpoint(None)
    """

    def on_begin(self, event: TrainingBegun) -> None:
        """Before the first step, or the first one after a resumption."""

    def on_step(self, event: StepDone) -> None:
        """After every step, its evaluation included."""

    def on_evaluation(self, event: EvaluationDone) -> None:
        """After an evaluation on held-out problems."""

    def on_checkpoint(self, event: CheckpointSaved) -> None:
        """Called when a checkpoint is whole and on the disk."""

    def on_end(self, event: TrainingEnded) -> None:
        """After the last step, or after the one at which the run was stopped."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""The methods that a callback has."""


def callbacks_of(given: Any) -> tuple[Callback, ...]:
    """The callbacks that are given, or the one. Raises ValueError for what is none."""
    several = isinstance(given, Iterable) and not isinstance(given, Callback)
    callbacks = tuple(given) if several else (given,)
    for callback in callbacks:
        if isinstance(callback, type):
            raise ValueError(f"callbacks holds the class {callback.__name__}: write {callback.__name__}(), an object of it")
        if missing := [name for name in EVENTS if not callable(getattr(callback, name, None))]:
            remedy = "let its class derive from ramulus.Callback"
            raise ValueError(f"callbacks holds {callback!r:.80}, which has no {missing[0]}: {remedy}")
    return callbacks


_Happened = TypeVar("_Happened", bound=Event)


class Listeners:
    """The callbacks of a stage. What one raises is said and stops nothing; the first that asks the run to stop is noted in `stopped_by`."""

    def __init__(self, callbacks: Sequence[Callback] = (), say: Say = lambda text: None) -> None:
        self.callbacks, self.say = callbacks, say
        self.failing: set[tuple[int, str]] = set()
        self.stopped_by = ""

    def tell(self, method: Callable[[Callback], Callable[[_Happened], None]], event: _Happened) -> None:
        """Call one method of every callback. What it draws at random changes nothing: a run that goes on does not call it again."""
        generators = Generators.now() if self.callbacks else None
        for callback in self.callbacks:
            name, key = type(callback).__name__, (id(callback), "")
            try:
                call = method(callback)
                name = f"{name}.{getattr(call, '__name__', type(call).__name__)}"
                key = (id(callback), name)
                call(event)
                self.failing.discard(key)
            except StopTraining as stop:
                self.stopped_by = self.stopped_by or f"{name}: {stop or 'no reason given'}"
            except Exception as error:
                if key not in self.failing:
                    self.say(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}; the run goes on")
                self.failing.add(key)
        if generators is not None:
            generators.restore()

    def check(self) -> None:
        """Raise Stopped where a callback has asked for it."""
        if self.stopped_by:
            raise Stopped(self.stopped_by)
