"""Learners that the conformance suite runs over, and what builds their policies in another process."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import methods  # noqa: F401  # its parts are unpickled in the other process, which must import it before methods_hpt
from ramulus.learn.policy import separate
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.separate import Separate
from ramulus.learn.policy.torch_learner import policy_of
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.starting import start_ranks
from ramulus.learn.sharded.world import STANDING
from tiny import build


@dataclass(frozen=True)
class Tiny:
    """Builds a policy on the tiny model, wherever it is called."""

    family: str = "qwen2"
    value: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: {"reference_model": True})

    def __call__(self) -> TorchPolicy:
        return policy_of(build(self.family, double=True), None, self.value, self.options)


def ranks(size: int) -> None:
    """Have so many ranks stand ready, for all tests that want so many; 0 lets them go."""
    if [world.size for world in STANDING] not in ([size], []) or not size:
        for world in STANDING:
            world.leave()
        STANDING.clear()
    if size and not STANDING:
        STANDING.append(start_ranks(size, 300.0))


atexit.register(ranks, 0)


def over_two_ranks(tiny: Tiny) -> Learner:
    """A learner over this process and one more."""
    ranks(2)
    model: Any = build(tiny.family, double=True)
    model.tiny = tiny  # unpickled there, it has this module imported before any other of the tests
    return Sharded()(model, None, None, tiny.value, tiny.options, 0)


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["conformance.learners", "ramulus.learn.policy.separate"])


def in_another_process(tiny: Tiny) -> Learner:
    """A learner in a process of its own, forked from one that has loaded all that it needs: that takes longer than what is asked of it."""
    with mock.patch.object(separate, "multiprocessing", SimpleNamespace(get_context=lambda _: FORKED)):
        return Separate(tiny)


LEARNERS: dict[str, Callable[[Tiny], Learner]] = {
    "in process": lambda tiny: InProcess(tiny()),
    "in another process": in_another_process,
    "over two ranks": over_two_ranks,
}


@contextmanager
def learner(kind: str, tiny: Tiny) -> Iterator[Learner]:
    """A learner of this kind, closed afterwards."""
    made = LEARNERS[kind](tiny)
    try:
        yield made
    finally:
        made.close()


def near(one: Any, other: Any, exact: bool) -> bool:
    """Whether two answers are the same bits, or unless `exact` the same but for the order of sums."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    if isinstance(one, float):
        return one == other or (not exact and abs(one - other) <= 1e-10 * max(1.0, abs(other)))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(near(one[name], other[name], exact) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(near(a, b, exact) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def run(work: Any) -> Any:
    """What a coroutine answers."""
    return asyncio.run(work)
