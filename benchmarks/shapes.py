"""Trees of a wanted size and reuse, and their flat trajectories."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.tree_batch import TreeBatch

KINDS = ("paths", "star", "binary", "4-4", "chain")
PATH = 256  # tokens of a path where nothing is shared


@dataclass(frozen=True)
class Flat:
    """One trajectory and what its loss needs."""

    tokens: Tensor  # [L] long
    prompt: int  # tokens of it that are the prompt
    behavior: Tensor  # [L - prompt] log-probs as sampled
    credit: float  # advantage times the weight of each token


def plant(kind: str, ratio: float, tokens: int, vocabulary: int, seed: int = 0) -> Tree:
    """A tree of about `tokens` unique tokens whose trajectories hold about `ratio` times as many; node lengths vary by a quarter.

    paths: nothing but four prompt tokens is shared. star: one prompt, 16 leaves. binary, 4-4: a prompt, then equal levels. chain: a
    spine with a leaf at every joint. Prompts are as long as the ratio asks.
    """
    if kind == "paths":
        return regular([max(tokens // PATH, 2)], 4, min(PATH, tokens // 2), vocabulary, seed)
    if kind == "chain":
        joints = max(round(4 * ratio - 3), 2)
        return caterpillar(joints, max(tokens // (2 * joints), 1), vocabulary, seed)
    levels = {"star": [16], "4-4": [4, 4], "binary": [2] * {2: 3, 4: 4}.get(round(ratio), 5)}[kind]
    leaves, nodes = 1, 0
    for children in levels:
        leaves *= children
        nodes += leaves
    # leaves * (P + depth * n) = ratio * (P + nodes * n) and P + nodes * n = tokens
    share = max((ratio * nodes - leaves * len(levels)) / (leaves - ratio), 0.1)
    n = tokens / (share + nodes)
    return regular(levels, max(round(share * n), 4), max(round(n), 1), vocabulary, seed)


def regular(levels: list[int], prompt: int, length: int, vocabulary: int, seed: int) -> Tree:
    """Every node of a level has as many children."""
    rng = random.Random(seed)
    tree = Tree.plant(Task("regular", words(rng, prompt, vocabulary), ""))
    nodes = [tree.root]
    for children in levels:
        nodes = [hang(tree, rng, node, length, vocabulary) for node in nodes for _ in range(children)]
    return rewarded(tree, rng)


def caterpillar(joints: int, length: int, vocabulary: int, seed: int) -> Tree:
    """A spine of as many pieces, and a leaf beside the next piece at the end of each."""
    rng = random.Random(seed)
    tree = Tree.plant(Task("chain", words(rng, 4, vocabulary), ""))
    node = tree.root
    for _ in range(joints):
        node = hang(tree, rng, node, length, vocabulary)
        hang(tree, rng, node, length, vocabulary)
    return rewarded(tree, rng)


def deep(kind: str, tokens: int, vocabulary: int) -> Tree:
    """About a thousand nodes: nine binary levels, or a chain of 500 joints."""
    if kind == "chain":
        return caterpillar(500, max(tokens // 1000, 1), vocabulary, 0)
    return regular([2] * 9, max(round(tokens / 1023), 1), max(round(tokens / 1023), 1), vocabulary, 0)


def words(rng: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(rng.randrange(2, vocabulary) for _ in range(count))


def hang(tree: Tree, rng: random.Random, parent: Node, length: int, vocabulary: int) -> Node:
    """A new node of about this length."""
    count = max(length + rng.randint(-(length // 4), length // 4), 1)
    return tree.add(parent, list(words(rng, count, vocabulary)), Author.POLICY)


def rewarded(tree: Tree, rng: random.Random) -> Tree:
    """Rewards of 0 and 1, both at least once, and an end for every leaf."""
    for i, leaf in enumerate(tree.leaves()):
        leaf.finish, leaf.reward = "eos", float(i) if i < 2 else float(rng.random() < 0.5)
    return tree


def flatten(tree: Tree, batch: TreeBatch) -> list[Flat]:
    """The trajectories of a tree of one prompt, weighted as `batch`, which holds it alone, weighs its leaves."""
    rows = []
    for k, leaf in enumerate(tree.leaves()):
        behavior = [x for node in leaf.line()[1:] for x in node.logprobs]
        weight = float(batch.leaf_weight[0, k] * batch.leaf_credit[0, k])
        rows.append(Flat(torch.tensor(leaf.prefix()), len(tree.root.tokens), torch.tensor(behavior), weight))
    return rows
