"""What an evaluation samples for each problem: independent attempts, a tree, a greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ramulus.engine.engine import Sampling
from ramulus.grow.branching import Branching, Star
from ramulus.grow.segments import Segments
from ramulus.look.evaluation.evaluate import cold


@dataclass(frozen=True)
class SamplingPlan:
    """What is sampled for each problem."""

    samples: int  # independent attempts; 0 for none
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True
    width: int = 0  # answers of a tree; 0 for no tree
    segment: int = 64
    branching: int = 2
    max_tokens: int | None = None
    seed: int = 0
    chunk: int | None = None  # problems sampled together

    def __post_init__(self) -> None:
        if self.samples < 0 or self.width < 0:
            raise ValueError(f"answers are counted from 0, got samples={self.samples} and width={self.width}")
        if self.samples + self.width < 1 and not self.greedy:
            raise ValueError("an evaluation needs samples >= 1, a tree, or greedy attempts: nothing was asked for")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"--chunk is a number of problems, at least 1, got {self.chunk}")
        if self.width and self.samples and self.samples < self.width:
            raise ValueError(
                f"a tree of {self.width} answers is compared with as many independent ones: ask for --samples of at least {self.width}"
            )
        if self.segment < 1 or self.branching < 1:
            raise ValueError(
                f"--segment is a number of tokens and --branching one of branches, each at least 1, got {self.segment} and {self.branching}"
            )
        Sampling(1, self.temperature, self.top_p)

    @property
    def answers(self) -> int:
        """Answers to each problem: over all kinds of sampling."""
        return self.samples + self.width + self.greedy

    def kinds(self, most: int) -> dict[str, tuple[Branching, Sampling, int]]:
        """(branching, sampling, visit) of each kind of tree, responses having at most so many tokens.

        A tree is another visit of its problem, so its answers and the independent ones share no random numbers.
        """
        hot = Sampling(most, self.temperature, self.top_p)
        kinds: dict[str, tuple[Branching, Sampling, int]] = {}
        if self.samples:
            kinds["sampled"] = (Star(self.samples), hot, 0)
        if self.width:
            kinds["tree"] = (
                Segments(self.width, -(-most // self.segment), self.segment, min(self.branching, self.width)),
                hot,
                1,
            )
        if self.greedy:
            kinds["greedy"] = (Star(1), cold(hot), 0)
        return kinds


def refuse_unused(reason: str, **given: bool) -> None:
    """Raise ValueError for the options that were given and would change nothing."""
    if names := [f"--{name.replace('_', '-')}" for name, there in given.items() if there]:
        raise ValueError(f"{reason}: leave out {', '.join(names)}")


def plan_of(
    samples: int,
    temperature: float,
    top_p: float,
    greedy: bool,
    tree: tuple[int, int, int] | None,
    max_tokens: int | None,
    seed: int,
    chunk: int | None,
) -> SamplingPlan:
    """The plan of a command line; `tree`: width, segment, branching."""
    width, segment, branching = tree or (0, SamplingPlan.segment, SamplingPlan.branching)
    if tree is not None and width < 1:
        raise ValueError("a tree needs answers: ask for --samples or --width of at least 1")
    return SamplingPlan(samples, temperature, top_p, greedy, width, segment, branching, max_tokens, seed, chunk)


def whole_numbers(words: Sequence[str]) -> tuple[int, ...]:
    """The numbers in words such as 1,8,32 or 1 8 32."""
    parts = [part for word in words for part in word.split(",") if part.strip()]
    wrong = [part for part in parts if not part.strip().isdecimal()]
    if wrong:
        raise ValueError(f"--k wants whole numbers such as 1,8,32, got {wrong[0]!r}")
    return tuple(int(part) for part in parts)
