"""`learner=Torch(...)` in a recipe: what builds the learner. Torch itself is loaded when it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ramulus.learn.factory import LearnerMemory, LearnerTraits
from ramulus.native.processors import device_of

if TYPE_CHECKING:
    from ramulus.learn.policy.learner import Learner
    from ramulus.learn.policy.torch_policy import TorchPolicy

_Source = Callable[[], tuple[Any, Any]]
"""Builds (model, tokenizer): `Pretrained` or `Scratch`."""


@dataclass(frozen=True)
class Torch:
    """Trains with torch, in this process or in one of its own.

    In this process the engine reads the parameters in place. A process of its own has a model of its own, on its own device if it is given
    one, and the engine is handed the weights after every step.

    Example:
        >>> from ramulus import Torch
        >>> Torch(process=True, device="cuda:1").attention
        'auto'
    """

    process: bool = False
    device: str | None = None  # of a process of its own; None takes the run's
    chunk: int = 1024  # targets whose logits exist at once
    attention: str = "auto"
    float32_masters: bool = True  # the optimizer steps float32 copies of weights in half precision: 4 bytes more a weight

    def __post_init__(self) -> None:
        if self.device is not None and not self.process:
            raise ValueError(f"learner.device={self.device!r} is of a process of its own: set learner.process=true, or device=... for the run")
        if self.chunk < 1:
            raise ValueError(f"learner.chunk must be at least 1, got {self.chunk}")

    @property
    def traits(self) -> LearnerTraits:
        """In a process of its own or not, and on which device; what its memory depends on."""
        memory = LearnerMemory(self.chunk, self.float32_masters, keeps_blocks=not self.process)  # which the processes beside it could not take
        return LearnerTraits(self.process, memory=memory, process=self.process, device=self.device)

    def __call__(self, model: Any, tokenizer: Any, source: _Source, value: bool, options: Mapping[str, Any], seed: int) -> Learner:
        """A learner of `model`, or where it has a process of its own of what `source` builds there; `options` are those of TorchPolicy."""
        from ramulus.learn.policy.in_process import InProcess
        from ramulus.learn.policy.separate import Separate

        more = dict(options) | {"chunk": self.chunk, "attention": self.attention, "float32_masters": self.float32_masters}
        if not self.process:
            return InProcess(policy_of(model, tokenizer, value, more), keeps=True)
        return Separate(Build(source, str(device_of(self.device)) if self.device else str(model.device), seed, value, more))


@dataclass(frozen=True)
class Build:
    """Builds a policy in another process."""

    source: _Source
    device: str
    seed: int
    value: bool = False  # with a value head
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> TorchPolicy:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(self.seed)
        model, tokenizer = self.source()
        return policy_of(model.to(self.device), tokenizer, self.value, self.options)


def policy_of(model: Any, tokenizer: Any, value: bool, options: Mapping[str, Any]) -> TorchPolicy:
    """A policy, with a value head if that is wanted, whose model can be saved. Raises ValueError as `TorchPolicy` and its `try_writing` do."""
    from ramulus.learn.policy.torch_policy import TorchPolicy
    from ramulus.learn.policy.value_head import ActorCritic

    policy = (ActorCritic if value else TorchPolicy)(model, tokenizer, **options)
    policy.try_writing()
    return policy
