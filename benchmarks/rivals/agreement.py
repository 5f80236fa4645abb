"""Does ramulus learn from TRL's own batch what TRL learns from it? The same completions, the same credit, the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from benchmarks.rivals.environment import Worker
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term
from ramulus.learn.objective.reference import Recomputed
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy

if TYPE_CHECKING:
    from benchmarks.step import Setting

EQUAL = {"float32": 1e-4, "bfloat16": 2e-2}  # relative difference of two gradients


def forest_of(
    seen: dict[str, torch.Tensor], setting: Setting, decode: Callable[[list[int]], str]
) -> tuple[list[Tree], dict[int, float]]:
    """TRL's batch as stars, graded by ramulus, and its own advantages by id(leaf)."""
    answers = {problem.text: problem.answer for problem in setting.problems}
    trees: dict[tuple[int, ...], Tree] = {}
    theirs = {}
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
    passes = sum(name.endswith("/advantages") for name in seen)
    rows = [row for i in range(passes) for row in zip(*(seen[f"{i}/{name}"] for name in names), strict=True)]
    for prompt, shown, completion, trained, advantage in rows:
        tokens, response = tuple(prompt[shown.bool()].tolist()), completion[trained.bool()].tolist()
        text = decode(list(tokens))
        tree = trees.setdefault(tokens, Tree.plant(Task(text, tokens, text, answers[text])))
        leaf = tree.add(tree.root, response, Author.POLICY)
        finish = "length" if len(response) == setting.response else "eos"
        said = setting.reward(tree.task, Response(decode(response), tuple(response), finish))
        leaf.reward = said["reward"] if isinstance(said, dict) else said
        theirs[id(leaf)] = float(advantage)
    return list(trees.values()), theirs


def agree(
    worker: Worker, policy: TorchPolicy, setting: Setting, decode: Callable[[list[int]], str], folder: Path
) -> float:
    """One step of TRL; the relative difference between the gradient of its loss and ramulus's of the same batch. Raises where they differ."""
    path = str(folder / "check.safetensors")
    worker.ask("check", path=path)
    worker.ask("step")
    seen = load_file(path)
    forest, theirs = forest_of(seen, setting, decode)
    mean = GroupMean(std=True, eps=1e-4)  # TRL adds that much to the deviation
    mix = Mix((Term(Estimator(Clip(0.2, 0.2, "recomputed"), Recomputed(), mean), normaliser=SequenceMean()),))
    score_now(policy, forest, {"recomputed"})
    for tree in forest:
        for leaf in tree.leaves():
            leaf.logprobs, leaf.kept, leaf.entropy, leaf.temperature = leaf.signals["recomputed"], None, None, 1.0
    credits = mix.credit(forest)
    for tree, credit in zip(forest, credits[0], strict=True):
        apart = max(abs((credit.leaf[leaf.id] or 0.0) - theirs[id(leaf)]) for leaf in tree.leaves())
        if len(list(tree.leaves())) != setting.width or apart > 1e-3:
            raise AssertionError(
                f"credit of task {tree.task.id} differs from TRL's by {apart} over {len(list(tree.leaves()))} leaves"
            )
    batches = pack(forest, credits, mix, setting.tokens)
    wanted = {name.removeprefix("grad/"): grad.double() for name, grad in seen.items() if name.startswith("grad/")}
    mine = gradient(policy, mix, batches)
    if wanted.keys() != mine.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(wanted.keys() ^ mine.keys())[:4]}")
    apart, limit = distance(mine, wanted), max(EQUAL[setting.dtype], EQUAL[setting.precision])
    if apart >= limit and policy.autocast:  # rounded products: theirs may be as far from those of float32 as ours are, and as much again
        exact = gradient(TorchPolicy(deepcopy(policy.model)), mix, batches)
        ours, their = distance(mine, exact), distance(wanted, exact)
        print(f"gradients beside those of float32 products: ours differ by {ours:.2e} of their size, TRL's by {their:.2e}", flush=True)
        apart, limit = their, max(limit, 2 * ours)
    if not apart < limit:
        raise AssertionError(f"the gradient of the same batch differs from TRL's by {apart:.2e} of its size")
    return apart


def gradient(policy: TorchPolicy, mix: Mix, batches: Sequence[TreeBatch]) -> dict[str, torch.Tensor]:
    """The gradient of some rows by name, in float64; afterwards there is none."""
    for batch in batches:
        policy.accumulate(mix, batch)
    found = {name: p.grad.detach().cpu().double() for name, p in policy.trainable.items() if p.grad is not None}
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The size of the difference of two gradients, as a share of that of the second."""
    size = sum(float(grad.square().sum()) for grad in other.values()) ** 0.5
    return sum(float((one[name] - grad).square().sum()) for name, grad in other.items()) ** 0.5 / size
