"""Learners that the conformance suite runs over, and what builds their policies in another process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import methods  # noqa: F401  # its parts are unpickled in the other process, which must import it before methods_hpt
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.separate import Separate
from ramulus.learn.policy.torch_learner import policy_of
from ramulus.learn.policy.torch_policy import TorchPolicy
from tiny import build


@dataclass(frozen=True)
class Tiny:
    """Builds a policy on the tiny model, wherever it is called."""

    family: str = "qwen2"
    value: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: {"reference_model": True})

    def __call__(self) -> TorchPolicy:
        return policy_of(build(self.family, double=True), None, self.value, self.options)


LEARNERS: dict[str, Callable[[Tiny], Learner]] = {
    "in process": lambda tiny: InProcess(tiny()),
    "in another process": Separate,
}


@contextmanager
def learner(kind: str, tiny: Tiny) -> Iterator[Learner]:
    """A learner of this kind, closed afterwards."""
    made = LEARNERS[kind](tiny)
    try:
        yield made
    finally:
        made.close()


def run(work: Any) -> Any:
    """What a coroutine answers."""
    return asyncio.run(work)
