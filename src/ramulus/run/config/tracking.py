"""How a run is filed where it is tracked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tracking:
    """Project, name and tags of a run in wandb, trackio and MLflow, and how many completions they are shown.

    A run is called NAME-seedN there, so that seeds stay apart; they share a group.

    Example:
        >>> from ramulus import Tracking
        >>> Tracking(project="sums", tags=("small", "grpo")).every
        10
    """

    project: str = "ramulus"  # of MLflow: the experiment
    name: str = ""  # "": that of the run
    group: str = ""  # "": the name of the run
    tags: tuple[str, ...] = ()
    completions: int = 16  # rows of a table of completions, TensorBoard's too; 0 shows none
    every: int = 10  # steps between two tables; the first step has one, and where trees_every left no trees there is none

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError("tracking.project cannot be empty: leave it out, or name one")
        if self.completions < 0 or self.every < 1:
            raise ValueError(f"tracking.completions must be at least 0 and tracking.every at least 1, got {self.completions} and {self.every}")
