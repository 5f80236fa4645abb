"""Trees inside verl (0.9): its agent loop grows them, its advantages and its policy loss are ramulus's, by the names that `register` gives them.

`TreeAgentLoop` and `TreeTrainer` are made when they are asked for, since verl may not be installed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramulus.adapters.flat import flat_paths
from ramulus.adapters.verl_engine import ClientEngine
from ramulus.core import store
from ramulus.core.recipe_part import needed, with_defaults
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Sampling
from ramulus.grow.branching import Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import Advantage
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Mask
from ramulus.learn.objective.mix import signals_of

TRAINER = "ramulus_sync"
_rows: ContextVar[Sequence[tuple[Tree, int] | None] | None] = ContextVar("_rows", default=None)
_growing: weakref.WeakValueDictionary[str, _Shared] = weakref.WeakValueDictionary()  # by the uid of a prompt, while its sessions wait


def register(name: str, estimator: Estimator) -> None:
    """Make an estimator known to verl: `algorithm.adv_estimator` and `actor.policy_loss.loss_mode` are its name, `trainer.v1.trainer_mode` is
    ramulus_sync. Call it in a module that VERL_USE_EXTERNAL_MODULES names. ValueError for what flat rows cannot have.
    """
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    register_adv_est(name)(TreeAdvantage(estimator.advantage))
    register_policy_loss(name)(TreeLoss(estimator))
    if "TreeTrainer" not in globals():
        __getattr__("TreeTrainer")


@dataclass(frozen=True)
class TreeAdvantage:
    """verl's advantage function: rewards [B, T] and the trees that the rows are paths of -> advantages and returns [B, T].

    Example:
        >>> from ramulus import SubgroupMean
        >>> from ramulus.adapters.verl import TreeAdvantage
        >>> TreeAdvantage(SubgroupMean()).advantage.__class__.__name__
        'SubgroupMean'
    """

    advantage: Any

    def __post_init__(self) -> None:
        column = with_defaults(self.advantage, Advantage).column
        if asked := [*needed(self.advantage), *([column] if column else [])]:
            raise ValueError(f"{self.advantage} reads {', '.join(asked)}, which verl does not compute: choose another advantage, or train by ramulus")

    def __call__(self, token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Rows that are of no tree, or whose path is not trained, have advantage 0."""
        rows = _rows.get()
        if rows is None or len(rows) != len(token_level_rewards):
            raise ValueError(f"verl does not say which paths these rows are: set trainer.v1.trainer_mode={TRAINER}, and sample by TreeAgentLoop")
        trees = list({id(row[0]): row[0] for row in rows if row is not None}.values())
        for leaf in (leaf for tree in trees for leaf in tree.leaves()):
            leaf.reward = None  # no row, no reward: verl may have left the path out
        for row, reward in zip(rows, token_level_rewards.sum(-1).tolist(), strict=True):
            if row is not None:
                next(leaf for leaf in row[0].leaves() if leaf.id == row[1]).reward = reward
        worth = {(id(trees[path.tree]), path.leaf.id): path.advantages for path in flat_paths(trees, self.advantage(trees))}
        advantages = torch.zeros_like(token_level_rewards)
        for line, row in zip(advantages, rows, strict=True):
            values = worth.get((id(row[0]), row[1])) if row is not None else None
            if values is not None:
                values = values[: len(line)]
                line[: len(values)] = torch.tensor(values, dtype=line.dtype)
        advantages = advantages * response_mask
        return advantages, advantages.clone()


@dataclass(frozen=True)
class TreeLoss:
    """verl's policy loss by an estimator's mask and reference: its gradient is the estimate, averaged as `loss_agg_mode` says.

    Both log-prob columns, as sampled and at the start of the step, are verl's `old_log_prob`, which `rollout_correction.bypass_mode` makes the
    sampler's.
    """

    estimator: Estimator

    def __post_init__(self) -> None:
        rule = self.estimator
        if rule.leaf is not None or signals_of(rule.mask) or with_defaults(rule.mask, Mask).measure is not None:
            raise ValueError(f"{rule} weighs paths or reads entropies, which verl's losses are not told: take a clip, or train by ramulus")

    def __call__(
        self, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean",
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """All [B, T] -> a loss, and what of it is logged."""
        from verl.trainer.ppo.core_algos import agg_loss

        where = response_mask.bool()
        logp, old, gain = log_prob[where].detach(), old_log_prob[where], advantages[where]
        factor = self.estimator.coefficient(logp, torch.zeros_like(logp), _batch(old, gain))
        weights = torch.zeros_like(log_prob).masked_scatter(where, factor)
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights
        known = dict(getattr(config, "global_batch_info", None) or {})
        loss = agg_loss(loss_mat=-weights * log_prob, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **known)
        stopped = (factor == 0) & (gain != 0)
        return loss, {"actor/pg_clipfrac": stopped.double().mean().item(), "actor/ppo_kl": (old - logp).mean().item()}


def _batch(old: Tensor, advantages: Tensor) -> TreeBatch:
    """The columns that a mask and a reference by token read, of tokens [N] that stand for themselves."""
    zero, place = torch.zeros_like(old), torch.arange(len(old), device=old.device)
    one, empty = torch.ones_like(old), place[:0]
    return TreeBatch(
        token=place, position=place, parent=place, end=place + 1, author=torch.full_like(place, int(Author.POLICY)), node=place, behavior=old,
        kept=zero, temperature=one, entropy=zero, sampled=one.bool(), weight=one, leaves=one, gain=advantages.clamp(min=0),
        pain=advantages.clamp(max=0), leaf_token=empty, leaf_length=empty, leaf_credit=one[:0], leaf_weight=one[:0],
        recomputed=old, recomputed_tempered=old,
    )  # fmt: skip


class _Shared:
    """One tree that all sessions of a prompt wait for."""

    def __init__(self) -> None:
        self.sessions = 0
        self.task: asyncio.Task[Tree] | None = None


class TreeLoop:
    """An agent loop whose sessions, `rollout.n` of a prompt, are the paths of one tree; sessions that a tree has no path for end without a row.

    In verl's agent loop file: `_target_: ramulus.adapters.verl.TreeAgentLoop`, and `branching` as another `_target_`, such as ramulus.Segments.
    """

    branching: Any

    def __init__(self, *arguments: Any, branching: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        this: Any = self
        self.branching = branching if branching is not None else Star(this.rollout_config.n)
        if names := needed(self.branching):
            raise ValueError(f"{self.branching} reads {', '.join(names)}, which verl does not compute: choose another sampler, or train by ramulus")

    async def run(self, sampling_params: dict[str, Any], **fields: Any) -> Any:
        """A path of the prompt's tree as an AgentLoopOutput; a list without any where it has none for this session."""
        from verl.experimental.agent_loop import AgentLoopOutput

        uid, session = str(fields["uid"]), int(fields.get("session_id", 0))
        shared = _growing.setdefault(uid, _Shared())
        place, shared.sessions = shared.sessions, shared.sessions + 1
        await asyncio.sleep(0)  # verl starts all sessions of a prompt at once: by now they are here
        if shared.task is None:
            shared.task = asyncio.create_task(self._grow(uid, sampling_params, shared.sessions, fields))
        tree = await asyncio.shield(shared.task)
        leaves = [leaf for leaf in tree.leaves() if leaf.author is Author.POLICY]
        if place >= len(leaves):
            return []
        tokens, path = leaves[place].response(), flat_of(tree, leaves[place].id)
        extra = {"turn_scores": [], "tool_rewards": [], "ramulus_uid": uid, "ramulus_leaf": leaves[place].id, "ramulus_session": session}
        return AgentLoopOutput(
            prompt_ids=list(tree.task.prompt), response_ids=tokens, response_mask=[1] * len(tokens), response_logprobs=path, num_turns=2, metrics={},
            extra_fields=extra | {"ramulus_tree": store.dump(tree).decode() if place == 0 else None},
        )  # fmt: skip

    async def _grow(self, uid: str, parameters: dict[str, Any], sessions: int, fields: dict[str, Any]) -> Tree:
        """The tree of a prompt; a star of its sessions where these are not `rollout.n`, as in validation."""
        this: Any = self
        prompt = await this.ct_build_initial_tokens(list(fields["raw_prompt"]))
        tree = Tree.plant(Task(uid, tuple(prompt), ""), step=int(fields.get("global_steps", 0)))
        most = this.rollout_config.response_length
        top_k = int(parameters.get("top_k", 0))
        sampling = Sampling(most, float(parameters.get("temperature", 1.0)), float(parameters.get("top_p", 1.0)), max(top_k, 0))
        engine = ClientEngine(this.server_manager, uid, this.rollout_config.prompt_length + most, this.rollout_config.name == "vllm")
        stop = Stop((this.tokenizer.eos_token_id,), most, this.tokenizer.decode)
        branching = self.branching if sessions == this.rollout_config.n else Star(sessions)
        await grow_forest([tree], engine, branching, sampling, stop)
        count = sum(leaf.author is Author.POLICY for leaf in tree.leaves())
        if count > sessions:
            raise ValueError(f"a tree has {count} paths where rollout.n is {sessions}: set rollout.n={count}, or branch less")
        return tree


def flat_of(tree: Tree, leaf: int) -> list[float]:
    """The log-prob of each token on a path of the policy."""
    end = next(node for node in tree.leaves() if node.id == leaf)
    return [float(value) for node in end.line()[1:] for value in node.logprobs]


@contextmanager
def knowing_trees(extra_fields: Sequence[Any]) -> Iterator[None]:
    """Let TreeAdvantage know of which trees the rows are paths, by what TreeAgentLoop wrote of each into `extra_fields`."""
    origins = [fields if isinstance(fields, dict) else {} for fields in extra_fields]
    trees = {fields["ramulus_uid"]: store.load(fields["ramulus_tree"].encode()) for fields in origins if fields.get("ramulus_tree")}
    rows = [(trees[fields["ramulus_uid"]], fields["ramulus_leaf"]) if fields.get("ramulus_uid") in trees else None for fields in origins]
    before = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(before)


class TreeTraining:
    """What makes a synchronous trainer of verl's one of trees: the advantages of a batch are told by its trees."""

    def __init__(self, config: Any) -> None:
        from omegaconf import open_dict

        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # it is one in everything else
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Compute verl's advantages while TreeAdvantage knows of which trees the rows are paths."""
        import transfer_queue

        data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        with knowing_trees(data.pop("extra_fields").tolist()):
            return super()._compute_advantage(batch, metrics=metrics)  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    """`TreeAgentLoop` and `TreeTrainer`, made of verl's own classes when they are asked for."""
    if name not in ("TreeAgentLoop", "TreeTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "TreeAgentLoop":
            from verl.experimental.agent_loop import AgentLoopBase

            cls = type(name, (TreeLoop, AgentLoopBase), {"__doc__": TreeLoop.__doc__, "__module__": __name__})
        else:
            from verl.trainer.ppo.v1 import register_trainer
            from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

            cls = register_trainer(TRAINER)(type(name, (TreeTraining, PPOTrainerSync), {"__doc__": TreeTraining.__doc__, "__module__": __name__}))
    except ImportError as error:
        raise ImportError(f"verl is not installed, or not whole ({error}): docs/adapters.md says how") from error
    globals()[name] = cls
    return cls
