"""What a recipe's `learner` is: a factory of learners, and what it says of one before it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LearnerFactory = Callable[[Any, Any, Any, bool, Mapping[str, Any], int], Any]
"""A frozen dataclass that builds the learner, a `Learner` of `policy/learner.py`.

It is given the model and its tokenizer in this process, what builds both again, whether there is to be a value head, the options of TorchPolicy,
and a seed. What it builds is the plainest kind, unless it has an attribute or property `traits`: a LearnerTraits.
"""


@dataclass(frozen=True)
class Ranks:
    """Processes that hold one model together, this one among them, which torchrun or a cluster may have started; else the learner starts them."""

    count: int | None = None  # on this machine; None: one a GPU, or one
    sharing: int | None = None  # that hold one copy of the weights together; None: those of a machine
    timeout: float = 1800.0  # seconds for which one waits for the others


@dataclass(frozen=True)
class LearnerMemory:
    """What the memory of a learner with AdamW depends on, beside its model and the recipe."""

    chunk: int = 1024  # targets whose logits exist at once
    float32_masters: bool = True  # the optimizer steps float32 copies of weights in half precision
    offload: bool = False  # what it keeps is not in a GPU's memory
    eighths: bool = False  # moments of a byte a weight
    keeps_blocks: bool = False  # of memory that tensors leave, on a CPU where that can be done


@dataclass(frozen=True)
class LearnerTraits:
    """What a factory says of its learner before it is built; as they stand here, of one that trains in this process the model that it is given.

    Example:
        >>> from ramulus import Sharded
        >>> Sharded(ranks=8).traits.ranks.count
        8
    """

    apart: bool = False  # it trains another model, in processes of its own or in this one too: what it is told is pickled, an engine here has its own
    ranks: Ranks | None = None  # where it may be several processes
    memory: LearnerMemory | None = None  # None: nothing is known of it, so that `auto` takes what is usual
    process: bool = False  # it trains in a process of its own beside this one
    device: str | None = None  # on which it trains; None: the run's


def learner_traits(factory: LearnerFactory) -> LearnerTraits:
    """What a factory says of its learner."""
    traits: LearnerTraits = getattr(factory, "traits", LearnerTraits())
    return traits
