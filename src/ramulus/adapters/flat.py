"""Paths of trees as rows of their own, which is how trainers without trees want them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.tree_batch import Credits


@dataclass(frozen=True)
class FlatPath:
    """One graded path of the policy: columns [L] over what follows the prompt, neutral where the policy wrote nothing.

    Example:
        >>> from ramulus import Author, Task, Tree
        >>> from ramulus.adapters.flat import flat_paths
        >>> tree = Tree.plant(Task("t", (1, 2), "t"))
        >>> leaf = tree.add(tree.root, [3, 4], Author.POLICY, logprobs=[-0.5, -0.25], finish="eos", reward=1.0)
        >>> [row] = flat_paths([tree])
        >>> row.tokens, row.logprobs, row.advantages
        ([3, 4], [-0.5, -0.25], None)
    """

    tree: int  # its number among the trees that were given
    leaf: Node
    prompt: list[int]
    tokens: list[int]  # [L]
    learned: list[bool]  # [L] the policy's own, on a path that is trained
    logprobs: list[float]  # [L] of the distribution really sampled from
    temperatures: list[float]  # [L]
    advantages: list[float] | None  # [L]; None where no path of the trees has any credit


def flat_paths(trees: Sequence[Tree], credits: Sequence[Credits] | None = None, name: str | None = None, settled: bool = False) -> list[FlatPath]:
    """The graded paths of the policy, tree by tree in preorder, with `credits` or, without any, what a run wrote into its trees as `credit/NAME`.

    Paths that were not trained have advantage 0 and nothing learned. Credit that differs between the paths below a shared token is written as its
    mean over them. Demonstrations are no rows: nobody sampled them. ValueError where several credits are written and `name` says none of them;
    a `settled` name is that of a whole run, and of a part of it in which nothing was trained no path has any.
    """
    leaves = [(i, leaf) for i, tree in enumerate(trees) for leaf in graded_leaves([tree])]
    column = None if credits is not None else name if settled else credit_name([leaf for _, leaf in leaves], name)
    rows, trained = [], [credit.trained() for credit in credits or ()]
    for number, leaf in leaves:
        if credits is not None:
            values = credits[number].along(leaf.id, own(leaf)) if leaf.id in trained[number] else None
        else:
            values = _written(leaf, column) if column is not None else None
        rows.append(_row(number, leaf, values, bare=credits is None and column is None))
    return rows


def own(leaf: Node) -> list[Node]:
    """The nodes on the path of a leaf that the policy wrote."""
    return [node for node in leaf.line() if node.author is Author.POLICY]


def graded_leaves(trees: Iterable[Tree]) -> list[Node]:
    """The ends of the graded paths of the policy, those without a token left out."""
    leaves = [leaf for tree in trees for leaf in tree.leaves() if leaf.author is Author.POLICY and leaf.reward is not None]
    return [leaf for leaf in leaves if any(node.tokens for node in own(leaf))]


def credit_name(leaves: Iterable[Node], name: str | None = None) -> str | None:
    """Which credit to read from verdicts; None where none is there."""
    known = sorted({key.removeprefix("credit/") for leaf in leaves for key in leaf.verdict if key.startswith("credit/")})
    if name is not None and name not in known:
        raise ValueError(f"no path has a credit {name!r}: {'there is none at all' if not known else 'there are ' + ', '.join(known)}")
    if name is None and len(known) > 1:
        raise ValueError(f"the paths have several credits, {', '.join(known)}: say which one, as in --credit {known[0]}")
    return name or next(iter(known), None)


def _written(leaf: Node, name: str) -> np.ndarray | None:
    """What a run wrote of the tokens of a leaf's path; None where it trained the path not at all."""
    mean = leaf.verdict.get(f"credit/{name}")
    if mean is None:
        return None
    parts = [node.signals.get(f"credit/{name}", np.full(len(node.tokens), mean)) for node in own(leaf)]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])


def _row(number: int, leaf: Node, values: np.ndarray | None, bare: bool) -> FlatPath:
    """The row of a leaf, from what each of its sampled tokens is worth."""
    prompt, *nodes = leaf.line()
    line: tuple[list[int], list[bool], list[float], list[float], list[float]] = ([], [], [], [], [])
    at = 0
    for node in nodes:
        size, mine = len(node.tokens), node.author is Author.POLICY
        line[0].extend(node.tokens)
        line[1].extend([mine and (bare or values is not None)] * size)
        line[2].extend(node.logprobs if node.logprobs else [0.0] * size)
        line[3].extend(node.column("temperature") if node.logprobs else [1.0] * size)
        line[4].extend(values[at : at + size].tolist() if mine and values is not None else [0.0] * size)
        at += size * mine
    return FlatPath(number, leaf, list(prompt.tokens), *line[:4], None if bare else line[4])
