"""Random trees that hold everything a sampler can leave behind, and their flattened trajectories."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column

VOCABULARY = 11


def node_fields(rng: random.Random, count: int, author: Author, tempered: bool) -> dict:
    """Random per-token columns of a node."""
    signals = {name: column((-rng.uniform(0.05, 3) for _ in range(count)), "d") for name in ("recomputed", "reference_model")}
    signals |= {f"{name}_tempered": column([0.8 * x - 0.1 for x in signals[name]], "d") for name in list(signals)}
    if author is not Author.POLICY:
        return {"signals": signals}
    return {
        "logprobs": column(-rng.uniform(0.05, 2.5) for _ in range(count)),
        "kept": column(-rng.uniform(0, 0.3) if rng.random() < 0.3 else 0.0 for _ in range(count)),
        "entropy": column(rng.uniform(0, 2) for _ in range(count)),
        "temperature": column([rng.uniform(0.6, 1.4) for _ in range(count)]) if tempered else 1.0,
        "signals": signals,
    }


def grow(rng: random.Random, index: int, tempered: bool) -> Tree:
    """A random tree: early leaves, cuts, strict prefixes, wide forks, empty nodes, tool turns, demonstrations, leaves without reward."""
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4)))
    tree = Tree.plant(Task(f"q{index}", prompt, ""))
    for _ in range(rng.randint(3, 14)):
        spots = list(tree.walk())
        parent = rng.choice(spots) if rng.random() < 0.7 else spots[-1]
        author = (
            Author.TOOL
            if rng.random() < 0.08
            else Author.EXPERT
            if rng.random() < 0.12 and parent.parent is None
            else Author.POLICY
        )
        drop = rng.randint(0, len(parent.tokens)) if parent.parent is not None else 0
        count = rng.choice([0, 1, 1, 2, 3, 5])
        node = tree.graft(parent, drop, author=author)
        node.tokens = column((rng.randrange(VOCABULARY) for _ in range(count)), "i")
        for name, value in node_fields(rng, count, author, tempered).items():
            setattr(node, name, value)
        if rng.random() < 0.3:
            node.finish = "eos"
    for leaf in tree.leaves():
        leaf.finish = leaf.finish or "length"
        if rng.random() < 0.15:
            leaf.finish, leaf.reward = "pruned", None
        else:
            leaf.reward = rng.choice([0.0, 1.0, 1.0, -1.0, 0.25])
    return tree


def forest(seed: int, trees: int = 3, tempered: bool = False) -> list[Tree]:
    """Some random trees; always at least one policy leaf with and one without a good reward."""
    rng = random.Random(seed)
    grown = [grow(rng, index, tempered) for index in range(trees)]
    wide = grown[0]  # a branch point with many children, and both signs of credit below it
    for reward in (1.0, 0.0, 1.0, 0.0, 0.5):
        leaf = wide.add(
            wide.root, [rng.randrange(VOCABULARY) for _ in range(2)], Author.POLICY, finish="eos", reward=reward
        )
        for name, value in node_fields(rng, 2, Author.POLICY, tempered).items():
            setattr(leaf, name, value)
    trunk = wide.root.children[-1]
    for reward in (1.0, 0.0, 0.0):  # a finished leaf grown on: it stays a strict prefix of its siblings
        leaf = wide.graft(trunk)
        leaf.tokens, leaf.finish, leaf.reward = column((rng.randrange(VOCABULARY) for _ in range(3)), "i"), "eos", reward
        for name, value in node_fields(rng, 3, Author.POLICY, tempered).items():
            setattr(leaf, name, value)
    for tree in grown[:2]:  # a demonstration, and in the first tree a policy path that starts from a part of one
        demo = tree.add(
            tree.root, [rng.randrange(VOCABULARY) for _ in range(4)], Author.EXPERT, finish="eos", reward=1.0
        )
        demo.signals = node_fields(rng, 4, Author.EXPERT, tempered)["signals"]
    partial = wide.graft(wide.root.children[-1], 2)
    partial.tokens, partial.finish, partial.reward = column((rng.randrange(VOCABULARY) for _ in range(3)), "i"), "eos", 1.0
    for name, value in node_fields(rng, 3, Author.POLICY, tempered).items():
        setattr(partial, name, value)
    return grown


@dataclass
class Trajectory:
    """One path, flat: where each response token stands in its tree and what was recorded for it."""

    tree: int
    leaf: Node
    spots: list[tuple[int, int, int]]  # (tree, node id, offset)
    authors: list[Author]
    behavior: list[float]
    recomputed: list[float]
    reference: list[float]
    temperature: list[float]
    tokens: list[int]
    prompt: list[int]
    labels: tuple  # TreePO's label path
    forks: list[int]  # ids of the nodes on the path, the root first


def flatten(trees: list[Tree]) -> list[Trajectory]:
    """Every leaf of every tree as a row of its own."""
    rows = []
    for index, tree in enumerate(trees):
        for leaf in tree.leaves():
            row = Trajectory(
                index, leaf, [], [], [], [], [], [], [], list(tree.task.prompt), (), [n.id for n in leaf.line()]
            )
            for node in leaf.line()[1:]:
                row.labels += tuple((node.id, k) for k in range(node.levels))
                for offset, token in enumerate(node.tokens):
                    sampled = bool(node.logprobs)
                    row.spots.append((index, node.id, offset))
                    row.authors.append(node.author)
                    row.behavior.append(node.logprobs[offset] + node.kept[offset] if sampled else 0.0)
                    row.temperature.append(node.column("temperature")[offset] if sampled else 1.0)
                    row.recomputed.append(node.signals["recomputed"][offset])
                    row.reference.append(node.signals["reference_model"][offset])
                    row.tokens.append(token)
            rows.append(row)
    return rows
