"""Run: one frozen dataclass is the whole configuration; a recipe module returns it from `recipe()`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ramulus.core.task import Reward
from ramulus.engine.factory import EngineFactory
from ramulus.engine.local.factory import Local
from ramulus.grow.stop import BoxedAnswer, Repeats
from ramulus.learn.factory import LearnerFactory
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.torch_learner import Torch
from ramulus.run.config.ground import Ray, check_ground
from ramulus.run.config.kinds import check_kinds, refuse_classes, take_numbers
from ramulus.run.config.override import Word
from ramulus.run.config.tracking import Tracking
from ramulus.run.config.weighted import Weighted, named_rewards
from ramulus.run.config.words import CLUSTER, HELD_OUT, LEARNER, LORA, MODEL, PROBLEMS, REWARD

Model = Callable[[], tuple[Any, Any]]
"""A frozen dataclass that builds (model, tokenizer): `learn.model.Pretrained` or `Scratch`."""

UsualEngine = Local
"""What samples where nobody says: in a recipe that names no engine, and for models that are evaluated, rolled out or served."""

CALLED = {"tasks": 'File("problems.jsonl")', "evals": 'File("held-out.jsonl")', "branching": "Star(8)", "schedule": "Fixed(16)"}
"""Fields of a Run that are called, without a type that says so: one that is usual."""

ABOVE_0 = ("steps", "minibatches", "tokens_per_batch", "prompt_limit", "response_limit", "save_every", "keep", "eval_samples", "eval_limit")
"""Fields of a Run that are at least 1, where they are numbers."""


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with warm-up, decay and gradient clipping; `lr` is the peak learning rate.

    Example:
        >>> from ramulus import AdamW
        >>> AdamW(lr=1e-6, warmup=10).rate(step=5, steps=100)
        5e-07
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient norm; inf clips nothing
    warmup: int = 0  # steps of linear rise to `lr`
    decay: Literal["constant", "linear", "cosine"] = "constant"  # from the end of the warm-up to the last step
    floor: float = 0.0  # the share of `lr` at which a decay ends

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"optimizer.lr must be at least 0 and finite (at 0 nothing is learned: a control), got {self.lr}")
        if not self.clip > 0:
            raise ValueError(f"optimizer.clip must be above 0 (inf clips nothing), got {self.clip}")
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 < self.eps < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optimizer.betas must be in [0, 1), eps above 0 and weight_decay at least 0, got {self.betas}, {self.eps} and {self.weight_decay}"
            )
        if self.warmup < 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"warmup must be >= 0 and floor in [0, 1], got {self.warmup} and {self.floor}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (1-based) of `steps`."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        if self.decay == "constant":
            return self.lr
        share = (step - self.warmup - 1) / max(steps - self.warmup, 1)
        left = 1 - share if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return self.lr * (self.floor + (1 - self.floor) * left)


@dataclass(frozen=True)
class FinalEvaluation:
    """An evaluation on held-out tasks, before the first step and after the last one.

    Example:
        >>> from ramulus import FinalEvaluation
        >>> FinalEvaluation(samples=4, temperatures=()).samples
        4
    """

    tasks: Any = field(default=None, metadata=HELD_OUT)  # Source; None takes the run's `evals`
    samples: int = 8  # per problem, at temperature 1: mean@k, pass@k; greedy comes on top
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.7)  # of the starting model only: what mere sharpening would give
    limit: int | None = None  # problems; None takes all

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"final_evaluation.samples must be at least 1, got {self.samples}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"final_evaluation.limit must be at least 1 (None takes all problems), got {self.limit}")
        if any(not t > 0 for t in self.temperatures):
            raise ValueError(f"final_evaluation.temperatures must be above 0 (greedy is always evaluated), got {self.temperatures}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The whole configuration of one training run.

    Its parts are objects, not names; the command line sets any field by its dotted path (`branching.width=16`).
    Raises ValueError, with the value and the remedy, for settings that cannot work together.

    Example:
        >>> from ramulus.recipes import grpo
        >>> run = grpo.recipe()
        >>> run.name, run.branching
        ('grpo', Star(n=8))
    """

    name: str
    # Pretrained(...), Scratch(...), or a folder or hub name; later stages of a recipe continue from the one before
    model: Model | str = field(metadata=MODEL)
    tasks: Any = field(metadata=PROBLEMS)  # Source: what to train on
    evals: Any = field(default=None, metadata=HELD_OUT)  # Source: held-out problems; None evaluates nothing

    # prompts
    template: str | None = None  # with {problem}; None uses the tokenizer's chat template
    system: str | None = None  # system message of the chat template
    examples: Any = field(default=None, metadata=PROBLEMS)  # Source: worked problems that come before each one, as turns of its chat (few-shot)
    template_arguments: dict[str, Any] | None = None  # what else the chat template reads: {"enable_thinking": False}
    date: str = ""  # YYYY-MM-DD, for chat templates that write one; "": the day on which the run began, which is kept with it
    prompt_limit: int = 512  # tokens
    on_long: Literal["error", "drop"] = "error"  # what happens to a prompt above the limit

    # growing
    branching: Any  # Star(8), Segments(...): where trees grow
    response_limit: int = 512  # tokens
    temperature: Any = 1.0  # a number, or a rule on the logits
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    answer: Any = field(default=None, metadata={"word": Word(BoxedAnswer)})  # BoxedAnswer(): stop at a complete answer, not at EOS alone
    repetition: Any = field(default=None, metadata={"word": Word(Repeats)})  # Repeats(): stop where the text goes in circles
    pruning: tuple[Any, ...] = ()  # rules that end paths after a round
    schedule: Any  # Fixed(prompts), Dynamic(prompts): prompts per step
    signals: tuple[Any, ...] = ()  # what computes the signals that rules and advantages need; shipped ones need no mention but for an option
    demonstrations: int = 0  # of each task, grafted on its tree as expert leaves
    check_demonstrations: bool = (
        False  # by the rewards, as if the policy had written them; what fails is not learned from
    )

    # judging
    rewards: Reward | tuple[Weighted | Reward, ...] = field(default=(), metadata=REWARD)  # () only where nothing is sampled
    grading_seconds: float = 600.0  # that grading processes may compute in one step; what is left then is wrong, and counted
    filter_overlong: bool = False  # paths cut off at the limit are in no mean and no gradient (DAPO)

    # learning
    mix: Any  # Mix: the terms, the KL term, the entropy bonus
    steps: int
    minibatches: int = 1  # optimizer steps per forest
    ahead: int = (
        0  # 1: the first round of the next step's trees grows beside the later rounds of this one's, a version older
    )
    tokens_per_batch: int | Literal["auto"] = "auto"  # unique tokens in one forward and backward pass; auto: what fits, 8192 where there is room
    optimizer: AdamW = field(default_factory=AdamW)
    autocast: bool | Literal["auto"] = False  # bfloat16 matrix products; auto: where the device multiplies bfloat16
    activation_checkpointing: bool = False
    lora: Any = field(default=None, metadata=LORA)  # Lora(...): train low-rank adapters alone
    learner: LearnerFactory = field(default_factory=Torch, metadata=LEARNER)  # Torch(...), Sharded(...): what trains

    # the machine
    engine: EngineFactory = field(default_factory=UsualEngine)  # Local(...): what samples
    cluster: Ray | None = field(default=None, metadata=CLUSTER)  # Ray(...): samplers and trainers in processes of their own, here or on many machines
    seed: int = 0
    threads: int | None = None  # of torch; None takes OMP_NUM_THREADS, else the cores that others leave free
    device: str = "auto"  # cpu, cuda, cuda:1; auto takes cuda where there is one

    # watching and keeping
    eval_every: int = 0  # steps; 0 evaluates at the end only
    eval_samples: int = 4  # per problem, at temperature 1; greedy comes on top
    eval_limit: int | None = None  # problems
    final_evaluation: FinalEvaluation | None = field(default=None, metadata={"word": Word(FinalEvaluation)})
    save_every: int = 50  # steps
    keep: int = 2  # checkpoints besides the best one
    keep_optimizer: bool = True  # in all of them; false: in the last alone, the others hold the model and nothing goes on from them
    trees_every: int = 1  # steps between written forests; 0 writes none
    out: str = ""  # folder; "" is runs/NAME
    tensorboard: bool | None = None  # None: where it is installed
    wandb: bool = False
    trackio: bool = False
    mlflow: bool = False  # where MLFLOW_TRACKING_URI says
    tracking: Tracking = field(default_factory=Tracking)  # project, name, tags, tables of completions

    def __post_init__(self) -> None:
        take_numbers(self)
        needed = ("name", "model", "tasks", "branching", "schedule", "mix")
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ValueError(
                f"{missing[0]} cannot be {getattr(self, missing[0])!r}: leave it as the recipe has it, or give one there"
            )
        check_called(self)
        if not isinstance(self.mix, Mix):
            raise ValueError(f"mix must be a Mix of terms, got {self.mix!r:.80}")
        if not isinstance(self.temperature, int | float) and not callable(self.temperature):
            raise ValueError(f"temperature must be a number or a rule on the logits, got {self.temperature!r}")
        for name, usual in (("answer", "BoxedAnswer()"), ("repetition", "Repeats()"), ("lora", "Lora()")):
            if isinstance(getattr(self, name), bool | int | float | str | tuple | list | dict):
                raise ValueError(f"{name} is an object or None, got {getattr(self, name)!r}: {usual} in a recipe file, {name}=true for the usual one")
        check_kinds(self)
        for name in ABOVE_0:
            if getattr(self, name) not in ("auto", None) and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1{' (None takes all)' * (name == 'eval_limit')}, got {getattr(self, name)}")
        for name in ("demonstrations", "eval_every", "trees_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.grading_seconds > 0:
            raise ValueError(f"grading_seconds must be above 0 (inf sets no limit), got {self.grading_seconds}")
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 while training, got {self.temperature}: 1.0 is usual")
        if self.tokens_per_batch != "auto" and self.tokens_per_batch < self.prompt_limit + self.response_limit:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} cannot hold one path of prompt_limit + response_limit = "
                f"{self.prompt_limit} + {self.response_limit} tokens: raise it to {self.prompt_limit + self.response_limit} or more, or lower a limit"
            )
        check_ahead(self.ahead or min(1, self.cluster.ahead if self.cluster else 0), self.mix)
        check_ground(self)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 (None takes the number of cores), got {self.threads}")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out or f"runs/{self.name}").expanduser()

    def policy_options(self) -> dict[str, Any]:
        """What a learner is told of a run, as `TorchPolicy` takes it."""
        how = self.optimizer
        return {
            "betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay, "clip": how.clip, "autocast": self.autocast,
            "activation_checkpointing": self.activation_checkpointing, "lora": self.lora, "reference_model": self.mix.kl_coef > 0,
        }  # fmt: skip

    @property
    def begins(self) -> set[str]:
        """The columns that need no forward pass of their own: a step is one update, whose own pass gives them."""
        early = {name for signal in self.signals for name in signal.needs}
        return self.mix.begins - early if self.minibatches == 1 else set()

    def weighted(self) -> tuple[tuple[Reward, float, str], ...]:
        """(reward, weight, name) of each reward, as `grow.grade` takes them."""
        return named_rewards(self.rewards)


def check_called(run: Any) -> None:
    """Raise ValueError unless the parts that a run calls can be called, and are objects, not their classes."""
    for name in (part.name for part in fields(Run)):
        refuse_classes(getattr(run, name), name, name)
    if not callable(run.engine):
        raise ValueError(f"engine builds what samples, Local(slots=64) say; got {run.engine!r}")
    for name, usual in CALLED.items():
        part = getattr(run, name)
        if part is not None and not callable(part):
            raise ValueError(f"{name} must be a part that can be called, {usual} say, got {part!r:.80}")


def check_ahead(ahead: int, mix: Any) -> None:
    """Raise ValueError for a look ahead that is not built, or whose ratios would be wrong."""
    if ahead not in (0, 1):
        raise ValueError(f"ahead is 0 (on-policy) or 1 (one step off-policy), got {ahead}")
    if ahead and {"recomputed", "recomputed_tempered"} & mix.columns:
        raise ValueError(
            "ahead=1 trains tokens that an older version sampled, and Recomputed would take them for the newest: "
            "use Behavior() and column='behavior', or ahead=0"
        )


def writable(folder: Path, remedy: str = "choose another with out=FOLDER") -> None:
    """Raise OSError, naming the remedy, unless files can be made in `folder`; makes it where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write in the folder {folder}: {error.strerror or error}; {remedy}") from error
