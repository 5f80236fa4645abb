"""Reinforcement learning on verifiable rewards with one tree from sampler to optimizer.

The public names, each loaded from its room when it is first asked for, so that `import ramify` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramify.core.task import Path as Path
    from ramify.core.task import Task as Task
    from ramify.core.tree import Author as Author
    from ramify.core.tree import Node as Node
    from ramify.core.tree import Tree as Tree
    from ramify.engine.engine import Request as Request
    from ramify.engine.engine import Sampling as Sampling
    from ramify.engine.engine import Segment as Segment
    from ramify.engine.local import LocalEngine as LocalEngine
    from ramify.engine.toy import ToyEngine as ToyEngine
    from ramify.grow.adaptive import Adaptive as Adaptive
    from ramify.grow.branching import Bud as Bud
    from ramify.grow.branching import Star as Star
    from ramify.grow.forks import AttentionForks as AttentionForks
    from ramify.grow.forks import EarlyForks as EarlyForks
    from ramify.grow.forks import EntropyForks as EntropyForks
    from ramify.grow.growth import grow_forest as grow_forest
    from ramify.grow.prompts import PromptBatch as PromptBatch
    from ramify.grow.schedule import Dynamic as Dynamic
    from ramify.grow.schedule import Fixed as Fixed
    from ramify.grow.segments import Segments as Segments
    from ramify.grow.stop import Stop as Stop
    from ramify.grow.temperature import ByEntropy as ByEntropy
    from ramify.learn.advantage import Constant as Constant
    from ramify.learn.advantage import GroupMean as GroupMean
    from ramify.learn.batch import Credits as Credits
    from ramify.learn.batch import TreeBatch as TreeBatch
    from ramify.learn.estimator import Estimator as Estimator
    from ramify.learn.factor import HighEntropy as HighEntropy
    from ramify.learn.factor import ImportanceWeight as ImportanceWeight
    from ramify.learn.factor import Product as Product
    from ramify.learn.gate import Smooth as Smooth
    from ramify.learn.gate import Switch as Switch
    from ramify.learn.global_local import GlobalLocal as GlobalLocal
    from ramify.learn.mask import Clip as Clip
    from ramify.learn.mask import DualClip as DualClip
    from ramify.learn.mask import Everything as Everything
    from ramify.learn.mix import Mix as Mix
    from ramify.learn.mix import SequenceMean as SequenceMean
    from ramify.learn.mix import Term as Term
    from ramify.learn.mix import TokenMean as TokenMean
    from ramify.learn.model import Pretrained as Pretrained
    from ramify.learn.model import Scratch as Scratch
    from ramify.learn.pack import pack as pack
    from ramify.learn.policy import TorchPolicy as TorchPolicy
    from ramify.learn.reference import Behavior as Behavior
    from ramify.learn.reference import Itself as Itself
    from ramify.learn.reference import Recomputed as Recomputed
    from ramify.learn.signal import AdaptiveClip as AdaptiveClip
    from ramify.learn.signal import EntropySignal as EntropySignal
    from ramify.learn.signal import Redistribution as Redistribution
    from ramify.learn.subgroup import SubgroupMean as SubgroupMean
    from ramify.learn.token_group import TokenGroupMean as TokenGroupMean
    from ramify.look.evaluate import evaluate as evaluate
    from ramify.look.show import show as show
    from ramify.run.recipe import AdamW as AdamW
    from ramify.run.recipe import Exam as Exam
    from ramify.run.recipe import Run as Run
    from ramify.run.recipe import Weighted as Weighted
    from ramify.tasks.chain import ChainSum as ChainSum
    from ramify.tasks.files import File as File
    from ramify.tasks.gym import Gym as Gym
    from ramify.tasks.math import Boxed as Boxed
    from ramify.tasks.problem import Problem as Problem
    from ramify.tasks.rewards import ExactAnswer as ExactAnswer
    from ramify.tasks.rewards import Overlong as Overlong

__version__ = "0.1.0"

HOMES = {
    "core.task": ("Path", "Task"),
    "core.tree": ("Author", "Node", "Tree"),
    "engine.engine": ("Request", "Sampling", "Segment"),
    "engine.local": ("LocalEngine",),
    "engine.toy": ("ToyEngine",),
    "grow.adaptive": ("Adaptive",),
    "grow.branching": ("Bud", "Star"),
    "grow.forks": ("AttentionForks", "EarlyForks", "EntropyForks"),
    "grow.growth": ("grow_forest",),
    "grow.prompts": ("PromptBatch",),
    "grow.schedule": ("Dynamic", "Fixed"),
    "grow.segments": ("Segments",),
    "grow.stop": ("Stop",),
    "grow.temperature": ("ByEntropy",),
    "learn.advantage": ("Constant", "GroupMean"),
    "learn.batch": ("Credits", "TreeBatch"),
    "learn.estimator": ("Estimator",),
    "learn.gate": ("Smooth", "Switch"),
    "learn.factor": ("HighEntropy", "ImportanceWeight", "Product"),
    "learn.global_local": ("GlobalLocal",),
    "learn.mask": ("Clip", "DualClip", "Everything"),
    "learn.mix": ("Mix", "SequenceMean", "Term", "TokenMean"),
    "learn.model": ("Pretrained", "Scratch"),
    "learn.pack": ("pack",),
    "learn.policy": ("TorchPolicy",),
    "learn.reference": ("Behavior", "Itself", "Recomputed"),
    "learn.signal": ("AdaptiveClip", "EntropySignal", "Redistribution"),
    "learn.subgroup": ("SubgroupMean",),
    "learn.token_group": ("TokenGroupMean",),
    "look.evaluate": ("evaluate",),
    "look.show": ("show",),
    "run.recipe": ("AdamW", "Exam", "Run", "Weighted"),
    "tasks.chain": ("ChainSum",),
    "tasks.files": ("File",),
    "tasks.gym": ("Gym",),
    "tasks.math": ("Boxed",),
    "tasks.problem": ("Problem",),
    "tasks.rewards": ("ExactAnswer", "Overlong"),
}
"""Module: the public names it holds. The imports above say the same to type checkers; a test holds the two together."""

_HOME_OF = {name: f"ramify.{module}" for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Load a public name from its room (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ramify' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
