"""Trees inside TRL: its GRPOTrainer with ramulus's samplers as `rollout_func` and ramulus's credit in place of its advantages (TRL 1.16)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ramulus.adapters.flat import own
from ramulus.core.recipe_part import needed, with_defaults
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Engine, Sampling
from ramulus.engine.local.factory import MIB, Local
from ramulus.grow.branching import Star, length
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import Advantage
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run.event_loop import run_to_end
from ramulus.run.signals import SignalContext, Signals, provided

_VERSIONS = ("1.16",)  # of TRL that this was tried with
_PER_ROW = ("grpo", "sapo", "dr_grpo", "luspo")  # losses that are divided by all rows, also those that hold no path


@dataclass
class TreeRollouts:
    """A `rollout_func` for TRL's GRPOTrainer: every prompt of a step is a tree, every path of it one of the prompt's `num_generations` completions.

    `branching` is any of ramulus's samplers (its paths a tree at most `num_generations`; rows that a tree leaves empty are masked and have no
    advantage), `signals` what rules of it read, `pruning` is not known to TRL. Sampled by a local engine from the trainer's own weights, by
    its `temperature`, `top_p`, `top_k`, `min_p` and `max_completion_length`. Raises ValueError for what trees cannot do there: vLLM, tools, images.

    Example:
        >>> from ramulus import Segments
        >>> from ramulus.adapters.trl import TreeRollouts
        >>> TreeRollouts(Segments(width=8, depth=4, length=64)).slots
        64
    """

    branching: Any
    signals: tuple[Any, ...] = ()
    slots: int = 64  # rows that decode together
    memory: int = 2**30  # bytes of keys and values
    seed: int = 0
    trees: list[Tree] = field(default_factory=list)  # of the latest call
    rows: list[tuple[int, Node | None]] = field(default_factory=list)  # of the latest call: tree, and leaf, None for a filled row
    _engine: Engine | None = None
    _signals: Signals | None = None
    _calls: int = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Grow a tree of each distinct prompt in a row; the columns that TRL wants, one row a prompt."""
        _refuse(trainer)
        training = trainer.model.training
        wanted = trainer.num_generations if training else trainer.num_generations_eval
        groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        for prompt, count in groups:
            if count % wanted:
                raise ValueError(
                    f"a prompt comes {count} times where num_generations is {wanted}: trees are grown whole, so per_device_train_batch_size * "
                    f"steps_per_generation must be a multiple of num_generations (the prompt is {str(prompt)[:60]!r})"
                )
        ids = trainer._tokenize_prompts([prompt for prompt, _ in groups])[0]
        tasks = [Task(str(i), tuple(map(int, tokens)), str(prompt)) for i, ((prompt, _), tokens) in enumerate(zip(groups, ids, strict=True))]
        copies = [count // wanted for _, count in groups]
        self._calls += 1
        seed = self._seed(trainer)
        self.trees = [Tree.plant(task, seed, self._calls, visit) for task, many in zip(tasks, copies, strict=True) for visit in range(many)]
        trainer.model.eval()
        try:
            run_to_end(self._grow(trainer, self.branching if training else Star(wanted)))
        finally:
            trainer.model.train(training)
        self.rows = [row for i, tree in enumerate(self.trees) for row in _rows_of(i, tree, wanted)]
        return _columns(self.trees, self.rows)

    def _seed(self, trainer: Any) -> int:
        """63 bits of this call's own: tasks are named by their rows, so that nothing else tells one call, process or resumed run from another."""
        name = f"{self.seed}/{trainer.accelerator.process_index}/{trainer.state.global_step}/{self._calls}".encode()
        return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1

    async def _grow(self, trainer: Any, branching: Any) -> None:
        """Sample by the weights as they are now."""
        model, arguments = trainer.accelerator.unwrap_model(trainer.model), trainer.args
        if self._engine is None:
            self._engine = Local(self.slots, max(1, self.memory // MIB))(model, trainer._tokenizer.decode)
        await self._engine.load(None, self._calls)
        most = arguments.max_completion_length
        sampling = Sampling(most, arguments.temperature, arguments.top_p, arguments.top_k or 0, arguments.min_p or 0.0)
        stop = Stop(tuple(trainer.eos_token_ids), most, trainer._tokenizer.decode)
        names = needed(branching)
        between = self._between(model, trainer._tokenizer, names) if names else None
        await grow_forest(self.trees, self._engine, branching, sampling, stop, between=between)

    def _between(self, model: Any, tokenizer: Any, names: Sequence[str]) -> Callable[[list[Tree]], Any]:
        """What supplies these signals between two rounds, by forward passes of the trainer's model."""
        if self._signals is None:
            self._signals = Signals(provided(self.signals), SignalContext(InProcess(TorchPolicy(model, float32_masters=False)), tokenizer))
        signals = self._signals

        async def supply(trees: list[Tree]) -> None:
            await signals(trees, names)

        return supply


class TreeMixin:
    """What makes a GRPOTrainer of TRL one of trees: put before it among the bases, as `TreeGRPOTrainer` does."""

    def __init__(
        self, *arguments: Any, branching: Any, advantage: Any = None, signals: tuple[Any, ...] = (), slots: int = 64, **options: Any
    ) -> None:
        self.advantage: Any = SubgroupMean() if advantage is None else advantage
        column = with_defaults(self.advantage, Advantage).column
        if asked := [*needed(self.advantage), *([column] if column else [])]:
            raise ValueError(f"{self.advantage} reads {', '.join(asked)}, which TRL does not compute: choose another advantage, or train by ramulus")
        self._earned: torch.Tensor | None = None
        rollouts = TreeRollouts(branching, signals, slots)
        super().__init__(*arguments, rollout_func=rollouts, **options)  # type: ignore[call-arg]
        this: Any = self
        rollouts.seed = this.args.seed

    def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
        """As TRL, with none for rows that only fill a group, so that they are in no mean; remembered, as the credit of trees is told by them."""
        earned: torch.Tensor = super()._calculate_rewards(*arguments)  # type: ignore[misc]
        this: Any = self
        filled = torch.tensor([leaf is None for _, leaf in this.rollout_func.rows], device=earned.device)
        earned[this.accelerator.gather(filled)] = torch.nan
        self._earned = earned
        return earned

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch with advantages [B, T] from the trees."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        this: Any = self
        rollouts, earned = this.rollout_func, self._earned
        assert earned is not None
        mine = earned[this.accelerator.process_index * len(inputs) :][: len(inputs)]
        total = (mine * this.reward_weights.to(mine.device)).nansum(1)
        total[torch.isnan(mine).all(1)] = torch.nan
        _give(rollouts.rows, total.tolist())
        credits = self.advantage(rollouts.trees)
        of_tree = [credit.trained() for credit in credits]
        trained = [leaf is not None and leaf.id in of_tree[number] for number, leaf in rollouts.rows]
        batch["tool_mask"] = batch["tool_mask"] * torch.tensor(trained, device=batch["tool_mask"].device)[:, None]
        mask = batch["completion_mask"] * batch["tool_mask"]
        batch["num_items_in_batch"] = this.accelerator.gather(mask.sum()).sum()
        advantages = _advantages_of(rollouts.rows, credits, trained, mask.shape[1])
        if this.loss_type in _PER_ROW:
            advantages *= len(trained) / max(sum(trained), 1)
        batch["advantages"] = torch.from_numpy(advantages).to(mask.device, next(this.model.parameters()).dtype)
        _log(this, batch["advantages"], mask, rollouts)
        return batch


def _refuse(trainer: Any) -> None:
    """ValueError for what a tree cannot be grown with."""
    arguments = trainer.args
    for bad, what, remedy in (
        (trainer.use_vllm, "use_vllm", "trees are sampled by ramulus's local engine, so leave use_vllm out"),
        (bool(trainer.tools), "tools", "train conversations with tools by `ramulus train`"),
        (trainer._is_vlm, "a model of images", "give a model of text"),
        (arguments.repetition_penalty != 1, f"repetition_penalty={arguments.repetition_penalty}", "leave it at 1"),
        (trainer.mask_truncated_completions, "mask_truncated_completions", "leave it out"),
        (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, "sharded weights", "train on whole weights, by one process a GPU"),
    ):
        if bad:
            raise ValueError(f"TreeRollouts cannot go with {what}: {remedy}")


def _rows_of(number: int, tree: Tree, wanted: int) -> list[tuple[int, Node | None]]:
    """The leaves of a tree as rows, and filled ones up to `wanted`; ValueError where there are more."""
    leaves = [leaf for leaf in tree.leaves() if leaf.author is Author.POLICY]
    if len(leaves) > wanted:
        raise ValueError(f"a tree has {len(leaves)} paths where num_generations is {wanted}: set num_generations={len(leaves)}, or branch less")
    return [(number, leaf) for leaf in leaves] + [(number, None)] * (wanted - len(leaves))


def _columns(trees: Sequence[Tree], rows: Sequence[tuple[int, Node | None]]) -> dict[str, list[Any]]:
    """TRL's columns: prompt and completion ids, log-probs of the distribution sampled from, and env_mask, 0 on rows that hold no path."""
    columns: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for number, leaf in rows:
        shown = leaf if leaf is not None else next(leaf for leaf in trees[number].leaves())
        nodes = own(shown)
        tokens = [int(token) for node in nodes for token in node.tokens]
        columns["prompt_ids"].append(list(trees[number].task.prompt))
        columns["completion_ids"].append(tokens)
        columns["logprobs"].append([float(logp) for node in nodes for logp in node.logprobs])
        columns["env_mask"].append([int(leaf is not None)] * len(tokens))
    return columns


def _give(rows: Sequence[tuple[int, Node | None]], earned: Sequence[float]) -> None:
    """Give leaves their rewards; what no function could score (NaN) has none."""
    for (_, leaf), value in zip(rows, earned, strict=True):
        if leaf is not None:
            leaf.reward = None if np.isnan(value) else value


def _advantages_of(
    rows: Sequence[tuple[int, Node | None]], credits: Sequence[Credits], trained: Sequence[bool], length: int
) -> np.ndarray:
    """Credit of each token of each row [B, T]; 0 behind a completion, and on rows that are not trained."""
    advantages = np.zeros((len(rows), length))
    for line, (number, leaf), learned in zip(advantages, rows, trained, strict=True):
        if leaf is not None and learned:
            along = credits[number].along(leaf.id, own(leaf))
            line[: len(along)] = along
    return advantages


def _log(trainer: Any, advantages: torch.Tensor, mask: torch.Tensor, rollouts: TreeRollouts) -> None:
    """Into TRL's metrics and table of completions: what was shared, which rows stayed empty, and the mean credit of each path."""
    mode = "train" if trainer.model.training else "eval"
    sampled = sum(len(node.tokens) for tree in rollouts.trees for node in tree.walk() if node.author is Author.POLICY)
    separate = sum(length(leaf) for _, leaf in rollouts.rows if leaf is not None)
    trainer._metrics[mode]["trees/reuse_ratio"].append(separate / max(sampled, 1))
    trainer._metrics[mode]["trees/filled_rows"].append(float(sum(leaf is None for _, leaf in rollouts.rows)))
    every = trainer.accelerator.gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
    shown = trainer._logs["advantages"]
    for _ in range(min(len(every), len(shown))):
        shown.pop()
    shown.extend(every)


def __getattr__(name: str) -> Any:
    """`TreeGRPOTrainer`, made when it is asked for, since TRL may not be installed."""
    if name != "TreeGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import trl
    except ImportError as error:
        raise ImportError("TRL is not installed: pip install 'ramulus[trl]'") from error
    if not trl.__version__.startswith(_VERSIONS):
        warnings.warn(f"TreeGRPOTrainer was tried with TRL {', '.join(_VERSIONS)}, this is {trl.__version__}", stacklevel=2)
    trainer = type(name, (TreeMixin, trl.GRPOTrainer), {"__doc__": "TRL's GRPOTrainer on ramulus's trees.", "__module__": __name__})
    globals()[name] = trainer
    return trainer
