"""Reinforcement learning on verifiable rewards with one tree from sampler to optimizer.

The public names, each loaded from its room when it is first asked for, so that `import ramulus` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramulus.core.recipe_part import RecipePart as RecipePart
    from ramulus.core.task import Path as Path
    from ramulus.core.task import Task as Task
    from ramulus.core.tree import Author as Author
    from ramulus.core.tree import Node as Node
    from ramulus.core.tree import Tree as Tree
    from ramulus.engine.engine import Engine as Engine
    from ramulus.engine.engine import Request as Request
    from ramulus.engine.engine import Sampling as Sampling
    from ramulus.engine.engine import Segment as Segment
    from ramulus.engine.engine import StopRule as StopRule
    from ramulus.engine.factory import EngineTraits as EngineTraits
    from ramulus.engine.local.factory import Local as Local
    from ramulus.engine.local.local_engine import LocalEngine as LocalEngine
    from ramulus.engine.memory import EngineMemory as EngineMemory
    from ramulus.engine.remote.factory import Remote as Remote
    from ramulus.engine.toy import ToyEngine as ToyEngine
    from ramulus.engine.vllm.factory import Vllm as Vllm
    from ramulus.grow.adaptive import Adaptive as Adaptive
    from ramulus.grow.branching import Branching as Branching
    from ramulus.grow.branching import BranchingOptions as BranchingOptions
    from ramulus.grow.branching import Bud as Bud
    from ramulus.grow.branching import Star as Star
    from ramulus.grow.branching import dice as dice
    from ramulus.grow.branching import paths as paths
    from ramulus.grow.demonstration import Hinted as Hinted
    from ramulus.grow.fallback import Answered as Answered
    from ramulus.grow.fallback import Anyone as Anyone
    from ramulus.grow.fallback import BlockCut as BlockCut
    from ramulus.grow.fallback import FinishedFirst as FinishedFirst
    from ramulus.grow.fallback import FromStart as FromStart
    from ramulus.grow.fallback import LongAnswered as LongAnswered
    from ramulus.grow.fallback import LongerFirst as LongerFirst
    from ramulus.grow.fallback import RandomCut as RandomCut
    from ramulus.grow.fallback import WorstTokenCut as WorstTokenCut
    from ramulus.grow.forks import AttentionForks as AttentionForks
    from ramulus.grow.forks import EarlyForks as EarlyForks
    from ramulus.grow.forks import EntropyForks as EntropyForks
    from ramulus.grow.grading import grade as grade
    from ramulus.grow.growth import demonstrate as demonstrate
    from ramulus.grow.growth import grow_forest as grow_forest
    from ramulus.grow.prompts import PromptBatch as PromptBatch
    from ramulus.grow.schedule import Dynamic as Dynamic
    from ramulus.grow.schedule import Fixed as Fixed
    from ramulus.grow.schedule import Schedule as Schedule
    from ramulus.grow.segments import Segments as Segments
    from ramulus.grow.stop import BoxedAnswer as BoxedAnswer
    from ramulus.grow.stop import Repeats as Repeats
    from ramulus.grow.stop import Stop as Stop
    from ramulus.grow.temperature import ByEntropy as ByEntropy
    from ramulus.grow.worth import Agreement as Agreement
    from ramulus.grow.worth import Estimated as Estimated
    from ramulus.grow.worth import LowValue as LowValue
    from ramulus.grow.worth import MeanLogprob as MeanLogprob
    from ramulus.learn.advantage.baselines import Raw as Raw
    from ramulus.learn.advantage.baselines import Signed as Signed
    from ramulus.learn.advantage.baselines import SplitMean as SplitMean
    from ramulus.learn.advantage.baselines import Whitened as Whitened
    from ramulus.learn.advantage.entropy_advantage import ClipCov as ClipCov
    from ramulus.learn.advantage.entropy_advantage import Covarying as Covarying
    from ramulus.learn.advantage.entropy_advantage import EntropyAdvantage as EntropyAdvantage
    from ramulus.learn.advantage.gae import GAE as GAE
    from ramulus.learn.advantage.global_local import GlobalLocal as GlobalLocal
    from ramulus.learn.advantage.group import Advantage as Advantage
    from ramulus.learn.advantage.group import Constant as Constant
    from ramulus.learn.advantage.group import GroupMean as GroupMean
    from ramulus.learn.advantage.group import graded as graded
    from ramulus.learn.advantage.subgroup import SegmentValue as SegmentValue
    from ramulus.learn.advantage.subgroup import SegmentZScore as SegmentZScore
    from ramulus.learn.advantage.subgroup import SubgroupMean as SubgroupMean
    from ramulus.learn.advantage.token_group import TokenGroupMean as TokenGroupMean
    from ramulus.learn.batch.tree_batch import Credits as Credits
    from ramulus.learn.batch.tree_batch import TreeBatch as TreeBatch
    from ramulus.learn.factory import LearnerTraits as LearnerTraits
    from ramulus.learn.objective.entropy_signal import AdaptiveClip as AdaptiveClip
    from ramulus.learn.objective.entropy_signal import EntropySignal as EntropySignal
    from ramulus.learn.objective.entropy_signal import Redistribution as Redistribution
    from ramulus.learn.objective.estimator import Estimator as Estimator
    from ramulus.learn.objective.gate import Smooth as Smooth
    from ramulus.learn.objective.gate import Soft as Soft
    from ramulus.learn.objective.gate import Switch as Switch
    from ramulus.learn.objective.kl import KL as KL
    from ramulus.learn.objective.kl_cov import kl_cov as kl_cov
    from ramulus.learn.objective.leaf_weight import EntropyWeight as EntropyWeight
    from ramulus.learn.objective.leaf_weight import GeometricMean as GeometricMean
    from ramulus.learn.objective.leaf_weight import Leaf as Leaf
    from ramulus.learn.objective.leaf_weight import SequenceRatio as SequenceRatio
    from ramulus.learn.objective.mask import Behind as Behind
    from ramulus.learn.objective.mask import Clip as Clip
    from ramulus.learn.objective.mask import DualClip as DualClip
    from ramulus.learn.objective.mask import Everything as Everything
    from ramulus.learn.objective.mask import Mask as Mask
    from ramulus.learn.objective.mix import ConstantLength as ConstantLength
    from ramulus.learn.objective.mix import Mix as Mix
    from ramulus.learn.objective.mix import QuestionMean as QuestionMean
    from ramulus.learn.objective.mix import SequenceMean as SequenceMean
    from ramulus.learn.objective.mix import Term as Term
    from ramulus.learn.objective.mix import TokenMean as TokenMean
    from ramulus.learn.objective.per_author import PerAuthor as PerAuthor
    from ramulus.learn.objective.reference import Behavior as Behavior
    from ramulus.learn.objective.reference import Itself as Itself
    from ramulus.learn.objective.reference import Recomputed as Recomputed
    from ramulus.learn.objective.reference import Reference as Reference
    from ramulus.learn.objective.shaped_reference import Capped as Capped
    from ramulus.learn.objective.shaped_reference import One as One
    from ramulus.learn.objective.shaped_reference import Shaped as Shaped
    from ramulus.learn.objective.token_weight import HighEntropy as HighEntropy
    from ramulus.learn.objective.token_weight import IcePop as IcePop
    from ramulus.learn.objective.token_weight import ImportanceWeight as ImportanceWeight
    from ramulus.learn.objective.token_weight import Product as Product
    from ramulus.learn.packing.pack import pack as pack
    from ramulus.learn.policy.learner import Learner as Learner
    from ramulus.learn.policy.lora import Lora as Lora
    from ramulus.learn.policy.model import Pretrained as Pretrained
    from ramulus.learn.policy.model import Scratch as Scratch
    from ramulus.learn.policy.torch_learner import Torch as Torch
    from ramulus.learn.policy.torch_policy import TorchPolicy as TorchPolicy
    from ramulus.learn.policy.value_head import ActorCritic as ActorCritic
    from ramulus.learn.sharded.factory import Sharded as Sharded
    from ramulus.look.evaluation.evaluate import evaluate as evaluate
    from ramulus.look.viewer.show import show as show
    from ramulus.run.callbacks import Callback as Callback
    from ramulus.run.callbacks import CheckpointSaved as CheckpointSaved
    from ramulus.run.callbacks import EvaluationDone as EvaluationDone
    from ramulus.run.callbacks import StepDone as StepDone
    from ramulus.run.callbacks import StopTraining as StopTraining
    from ramulus.run.config.ground import Ray as Ray
    from ramulus.run.config.recipe import AdamW as AdamW
    from ramulus.run.config.recipe import FinalEvaluation as FinalEvaluation
    from ramulus.run.config.recipe import Run as Run
    from ramulus.run.config.tracking import Tracking as Tracking
    from ramulus.run.config.weighted import Weighted as Weighted
    from ramulus.run.from_python import train as train
    from ramulus.run.result import Result as Result
    from ramulus.run.signals import Concluded as Concluded
    from ramulus.run.signals import ForwardInfluence as ForwardInfluence
    from ramulus.run.signals import Signal as Signal
    from ramulus.run.signals import SignalContext as SignalContext
    from ramulus.run.signals import StateValue as StateValue
    from ramulus.run.signals import StepStarts as StepStarts
    from ramulus.tasks.chain import ChainAnswer as ChainAnswer
    from ramulus.tasks.chain import ChainSum as ChainSum
    from ramulus.tasks.chain import ForgetsCarry as ForgetsCarry
    from ramulus.tasks.files import File as File
    from ramulus.tasks.guard import Guarded as Guarded
    from ramulus.tasks.gym import Gym as Gym
    from ramulus.tasks.gym import GymScore as GymScore
    from ramulus.tasks.math import Boxed as Boxed
    from ramulus.tasks.problem import Problem as Problem
    from ramulus.tasks.problem import Source as Source
    from ramulus.tasks.problem import render as render
    from ramulus.tasks.rewards import ExactAnswer as ExactAnswer
    from ramulus.tasks.rewards import Format as Format
    from ramulus.tasks.rewards import Overlong as Overlong
    from ramulus.tasks.rewards import Unmarked as Unmarked
    from ramulus.tasks.sums import Sums as Sums
    from ramulus.tasks.word_problems import WordProblems as WordProblems

__version__ = "0.1.0"

HOMES = {
    "core.recipe_part": ("RecipePart",),
    "core.task": ("Path", "Task"),
    "core.tree": ("Author", "Node", "Tree"),
    "engine.engine": ("Engine", "Request", "Sampling", "Segment", "StopRule"),
    "engine.factory": ("EngineTraits",),
    "engine.local.factory": ("Local",),
    "engine.local.local_engine": ("LocalEngine",),
    "engine.memory": ("EngineMemory",),
    "engine.remote.factory": ("Remote",),
    "engine.toy": ("ToyEngine",),
    "engine.vllm.factory": ("Vllm",),
    "grow.adaptive": ("Adaptive",),
    "grow.branching": ("Branching", "BranchingOptions", "Bud", "Star", "dice", "paths"),
    "grow.demonstration": ("Hinted",),
    "grow.fallback": (
        "Answered", "Anyone", "BlockCut", "FinishedFirst", "FromStart", "LongAnswered", "LongerFirst", "RandomCut", "WorstTokenCut",
    ),
    "grow.forks": ("AttentionForks", "EarlyForks", "EntropyForks"),
    "grow.grading": ("grade",),
    "grow.growth": ("demonstrate", "grow_forest"),
    "grow.prompts": ("PromptBatch",),
    "grow.schedule": ("Dynamic", "Fixed", "Schedule"),
    "grow.segments": ("Segments",),
    "grow.stop": ("BoxedAnswer", "Repeats", "Stop"),
    "grow.temperature": ("ByEntropy",),
    "grow.worth": ("Agreement", "Estimated", "LowValue", "MeanLogprob"),
    "learn.advantage.baselines": ("Raw", "Signed", "SplitMean", "Whitened"),
    "learn.advantage.entropy_advantage": ("ClipCov", "Covarying", "EntropyAdvantage"),
    "learn.advantage.gae": ("GAE",),
    "learn.advantage.global_local": ("GlobalLocal",),
    "learn.advantage.group": ("Advantage", "Constant", "GroupMean", "graded"),
    "learn.advantage.subgroup": ("SegmentValue", "SegmentZScore", "SubgroupMean"),
    "learn.advantage.token_group": ("TokenGroupMean",),
    "learn.batch.tree_batch": ("Credits", "TreeBatch"),
    "learn.factory": ("LearnerTraits",),
    "learn.objective.entropy_signal": ("AdaptiveClip", "EntropySignal", "Redistribution"),
    "learn.objective.estimator": ("Estimator",),
    "learn.objective.gate": ("Smooth", "Soft", "Switch"),
    "learn.objective.kl": ("KL",),
    "learn.objective.kl_cov": ("kl_cov",),
    "learn.objective.leaf_weight": ("EntropyWeight", "GeometricMean", "Leaf", "SequenceRatio"),
    "learn.objective.mask": ("Behind", "Clip", "DualClip", "Everything", "Mask"),
    "learn.objective.mix": ("ConstantLength", "Mix", "QuestionMean", "SequenceMean", "Term", "TokenMean"),
    "learn.objective.per_author": ("PerAuthor",),
    "learn.objective.reference": ("Behavior", "Itself", "Recomputed", "Reference"),
    "learn.objective.shaped_reference": ("Capped", "One", "Shaped"),
    "learn.objective.token_weight": ("HighEntropy", "IcePop", "ImportanceWeight", "Product"),
    "learn.packing.pack": ("pack",),
    "learn.policy.learner": ("Learner",),
    "learn.policy.lora": ("Lora",),
    "learn.policy.model": ("Pretrained", "Scratch"),
    "learn.policy.torch_learner": ("Torch",),
    "learn.policy.torch_policy": ("TorchPolicy",),
    "learn.policy.value_head": ("ActorCritic",),
    "learn.sharded.factory": ("Sharded",),
    "look.evaluation.evaluate": ("evaluate",),
    "look.viewer.show": ("show",),
    "run.callbacks": ("Callback", "CheckpointSaved", "EvaluationDone", "StepDone", "StopTraining"),
    "run.config.ground": ("Ray",),
    "run.config.recipe": ("AdamW", "FinalEvaluation", "Run"),
    "run.config.tracking": ("Tracking",),
    "run.config.weighted": ("Weighted",),
    "run.from_python": ("train",),
    "run.result": ("Result",),
    "run.signals": ("Concluded", "ForwardInfluence", "Signal", "SignalContext", "StateValue", "StepStarts"),
    "tasks.chain": ("ChainAnswer", "ChainSum", "ForgetsCarry"),
    "tasks.files": ("File",),
    "tasks.guard": ("Guarded",),
    "tasks.gym": ("Gym", "GymScore"),
    "tasks.math": ("Boxed",),
    "tasks.problem": ("Problem", "Source", "render"),
    "tasks.rewards": ("ExactAnswer", "Format", "Overlong", "Unmarked"),
    "tasks.sums": ("Sums",),
    "tasks.word_problems": ("WordProblems",),
}
"""Module: the public names it holds. The imports above say the same to type checkers; a test holds the two together."""

_HOME_OF = {name: f"ramulus.{module}" for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Load a public name from its room (PEP 562)."""
    if name not in _HOME_OF:
        lines = import_module("ramulus.run.config.package_classes").imports_of([name]) if name[:1].isupper() else ()
        raise AttributeError(f"module 'ramulus' has no attribute {name!r}" + "".join(f": write {line}" for line in lines))
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
