"""A tree as the viewer's JSON: rows of nodes in preorder, columns per token, what each node's text and credit are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import pstdev
from typing import Any

from ramulus.core.tree import PER_TOKEN, Author, Node, Tree, correctness
from ramulus.look.viewer.text import Text

CREDIT = "credit/"
PLAIN = ("influence", "ratio")  # signals that are called by their own name
AGAIN = (
    "fallback",
    "restart",
    "influence",
    "early",
)  # `why` of what grew from a path that had ended; "nats" is EntropyForks'
SKETCH = 200  # nodes of a small picture


class Outline:
    """A tree's nodes in preorder and what one pass over them finds: row, depth, leaves below, value, credit of each."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.nodes = tree, list(tree.walk())
        self.row = {node.id: i for i, node in enumerate(self.nodes)}
        count = len(self.nodes)
        self.up = [self.row[node.parent.id] if node.parent is not None else -1 for node in self.nodes]
        self.start = [0] * count  # tokens above, the prompt counted
        for i, node in enumerate(self.nodes):
            if node.parent is not None:
                self.start[i] = self.start[self.up[i]] + len(node.parent.tokens)
        self.leaves = [int(not node.children) for node in self.nodes]
        self.first = [node.id for node in self.nodes]  # the lowest id at or below: what a cut piece was part of
        rewards = [node.reward if not node.children else None for node in self.nodes]
        self.graded = [int(reward is not None) for reward in rewards]
        self.total = [reward or 0.0 for reward in rewards]
        for i in range(count - 1, 0, -1):
            up = self.up[i]
            self.leaves[up] += self.leaves[i]
            self.first[up] = min(self.first[up], self.first[i])
            self.graded[up] += self.graded[i]
            self.total[up] += self.total[i]

    def value(self, i: int) -> float | None:
        """Mean reward of the graded leaves at or below."""
        return self.total[i] / self.graded[i] if self.graded[i] else None

    def why(self, i: int) -> str:
        """Why it grew: said at the first piece of what was sampled in one go, `continues` at those that cuts made below it."""
        up = self.up[i]
        if up > 0 and self.first[up] == self.first[i]:
            return "continues"
        return self.nodes[self.row[self.first[i]]].why if i else ""

    def above(self, i: int, most: int | None = None) -> list[int]:
        """The tokens above a node, or the last `most` of them."""
        parts: list[list[int]] = []
        held, up = 0, self.up[i]
        while up >= 0 and (most is None or held < most):
            parts.append(self.nodes[up].tokens.tolist())
            held, up = held + len(parts[-1]), self.up[up]
        tokens = [token for part in reversed(parts) for token in part]
        return tokens if most is None else tokens[-most:]


class Credit:
    """Credit of every node: a mean over the trained leaves below, from the leaves, or per token where the signals have it."""

    def __init__(self, outline: Outline) -> None:
        self.nodes = outline.nodes
        on_leaves = {name for node in self.nodes for name in node.verdict if name.startswith(CREDIT)}
        self.per_token = {name for node in self.nodes for name in node.signals if name.startswith(CREDIT)}
        self.names = sorted(on_leaves | self.per_token)
        self.sums = {name: [self.own(name, node) for node in self.nodes] for name in sorted(on_leaves)}
        for rows in self.sums.values():
            for i in range(len(rows) - 1, 0, -1):
                up, mine = outline.up[i], rows[i]
                rows[up] = tuple(a + b for a, b in zip(rows[up], mine))  # type: ignore[assignment]

    def own(self, name: str, node: Node) -> tuple[int, float, float]:
        """(leaves, gain, pain) of one node alone."""
        credit = node.verdict.get(name)
        return (0, 0.0, 0.0) if credit is None else (1, max(float(credit), 0.0), min(float(credit), 0.0))

    def columns(self, i: int, length: int) -> dict[str, list[float]]:
        """`credit/*`, gain and pain of a node, [length] each; of none that no trained leaf lies below."""
        columns: dict[str, list[float]] = {}
        gain, pain, known = [0.0] * length, [0.0] * length, False
        for name in self.names:
            if name in self.per_token:
                if name not in self.nodes[i].signals:
                    continue
                values = self.nodes[i].signals[name].tolist()
                up, down = [max(value, 0.0) for value in values], [min(value, 0.0) for value in values]
            else:
                leaves, high, low = self.sums[name][i]
                if not leaves:
                    continue
                values, up, down = [(high + low) / leaves] * length, [high / leaves] * length, [low / leaves] * length
            columns[name], known = values, True
            gain, pain = [a + b for a, b in zip(gain, up)], [a + b for a, b in zip(pain, down)]
        return columns | ({"gain": gain, "pain": pain} if known else {})


def _columns_of(node: Node, credit: Credit, i: int, length: int | None = None) -> dict[str, list[float]]:
    """Everything recorded per token at a node, [L] each; credit that is one value a node has `length` of it."""
    columns = {name: [figure(value) for value in node.column(name)] for name in PER_TOKEN}
    for name, values in node.signals.items():
        if not name.startswith(CREDIT):
            columns[name if name in PLAIN else f"signals/{name}"] = list(values)
    columns |= credit.columns(i, len(node.tokens) if length is None else length)
    return {name: values for name, values in columns.items() if values}


def order(names: set[str]) -> list[str]:
    """Columns in the order in which they are offered."""
    known = ["gain", "pain", "entropy", "logprobs", "temperature", "kept", "influence", "ratio"]
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN stays NaN."""
    return sum(values) / len(values)


def figure(value: float) -> float:
    """Six digits: what a colour or a label shows, in a third of the room."""
    return float(f"{value:.6g}")


def texts(outline: Outline, text: Text) -> list[str]:
    """The text that each node adds to what is above it."""
    above = [text.context(partial(outline.above, i)) for i in range(len(outline.nodes))]
    ends = [not node.children for node in outline.nodes]
    return text.after([(up, node.tokens, end) for up, node, end in zip(above, outline.nodes, ends, strict=True)])


def tree_json(tree: Tree, text: Text) -> dict[str, Any]:
    """The whole tree with the means of its columns."""
    outline = Outline(tree)
    credit = Credit(outline)
    words, nodes = texts(outline, text), []
    names: set[str] = set()
    for i, node in enumerate(outline.nodes):
        wide = len(node.tokens) or 1 if credit.per_token else 1  # one credit for all tokens needs to be said once
        means = {name: figure(_mean(values)) for name, values in _columns_of(node, credit, i, wide).items()}
        names |= means.keys()
        row = {"id": node.id, "parent": outline.up[i], "author": node.author.name.lower(), "start": outline.start[i]}
        row |= {"length": len(node.tokens), "leaves": outline.leaves[i], "version": node.version, "finish": node.finish}
        row |= {"reward": node.reward, "value": outline.value(i), "verdict": verdict_of(tree, node), "why": outline.why(i)}
        nodes.append(row | {"text": words[i], "means": means})
    task = {"id": tree.task.id, "text": tree.task.text, "answer": tree.task.answer}
    seen = {"task": task, "seed": tree.seed, "visit": tree.visit, "rounds": tree.rounds}
    return seen | {"columns": order(names), "nodes": nodes}


def verdict_of(tree: Tree, node: Node) -> dict[str, Any]:
    """A node's verdict, and that a schedule let nothing grow from it."""
    return node.verdict | ({"expanded": 0.0} if node.id in tree.unexpanded else {})


def node_json(tree: Tree, text: Text, place: int) -> dict[str, Any]:
    """One node token by token, and the text above it; KeyError for a node that is not there."""
    outline = Outline(tree)
    i = outline.row[place]
    node, above = outline.nodes[i], outline.above(i)
    columns = _columns_of(node, Credit(outline), i)
    return {
        "pieces": text.pieces(above, node.tokens, not node.children),
        "columns": {name: columns[name] for name in order(set(columns))},
        "prefix": text.whole(above).rstrip("\ufffd") if text.inner is not None else text.whole(above),
    }


def leaf_json(tree: Tree, text: Text, place: int) -> dict[str, Any]:
    """One whole path; KeyError for a node that is not there, ValueError for one with children."""
    outline = Outline(tree)
    leaf = outline.nodes[outline.row[place]]
    if leaf.children:
        raise ValueError(f"node {place} is no leaf: it has {len(leaf.children)} children")
    tokens = leaf.response()
    extracted = leaf.verdict.get("answer")
    return {
        "problem": tree.task.text,
        "text": text.whole(tokens, special=False),
        "answer": tree.task.answer,
        "extracted": None if extracted is None else str(extracted),
        "verdict": verdict_of(tree, leaf),
        "reward": leaf.reward,
        "finish": leaf.finish,
        "tokens": len(tokens),
        "nodes": [outline.row[node.id] for node in leaf.line()],
    }


def judgement(tree: Tree) -> tuple[list[Node], list[float]]:
    """(the paths that the policy ended, whether each graded one is correct); none is judged where no reward calls any so."""
    paths = [leaf for leaf in tree.leaves() if leaf.author is Author.POLICY]
    return paths, correctness(paths)


def right(judged: Sequence[float]) -> int:
    """How many judged paths are correct."""
    return sum(mark > 0 for mark in judged)


def flags_of(outline: Outline, judged: Sequence[float], rewards: Sequence[float]) -> list[str]:
    """What a tree can be filtered by; where nothing is called correct, whether its rewards differ."""
    nodes, flags = outline.nodes, []
    if any(node.finish == "pruned" for node in nodes):
        flags.append("pruned")
    if any(node.why in AGAIN or node.why.endswith(" nats") for node in nodes):
        flags.append("rebranched")
    if any(node.author is Author.EXPERT for node in nodes):
        flags.append("demonstration")
    if judged:
        flags.append("all_right" if min(judged) > 0 else "all_wrong" if max(judged) <= 0 else "mixed")
    elif len(set(rewards)) > 1:
        flags.append("mixed")
    return flags


def step_row(tree: Tree, index: int) -> dict[str, Any]:
    """What the list of a step's trees says about one of them; lengths are in response tokens."""
    outline = Outline(tree)
    paths, judged = judgement(tree)
    rewards = [leaf.reward for leaf in paths if leaf.reward is not None]
    prompt = len(tree.root.tokens)
    ends = [outline.start[outline.row[leaf.id]] + len(leaf.tokens) - prompt for leaf in paths or tree.leaves()]
    own = [(i, node) for i, node in enumerate(outline.nodes) if node.author is Author.POLICY]
    written = sum(len(node.tokens) for _, node in own)
    policy = {leaf.id for leaf in paths}
    below = [int(node.id in policy) for node in outline.nodes]
    for i in range(len(below) - 1, 0, -1):
        below[outline.up[i]] += below[i]
    along = sum(len(node.tokens) * max(below[i], 1) for i, node in own)
    row = {"index": index, "task": tree.task.id, "text": tree.task.text, "visit": tree.visit, "paths": len(paths)}
    row |= {"correct": right(judged), "pass_rate": _mean(judged) if judged else None, "reward": _mean(rewards) if rewards else None}
    row |= {"spread": pstdev(rewards) if rewards else 0.0, "reuse": along / written if written else 0.0}
    row |= {"length": _mean(ends) if ends else 0.0, "tokens": sum(len(node.tokens) for node in outline.nodes) - prompt}
    return row | {"flags": flags_of(outline, judged, rewards), "skeleton": skeleton(outline)}


def skeleton(outline: Outline) -> list[list[Any]]:
    """[row of the parent or -1, start, length, leaves, value or None] of the nodes with most leaves below, in preorder."""
    count = len(outline.nodes)
    kept = range(count)
    if (
        count > SKETCH
    ):  # a parent has at least the leaves of its children and stands before them: it is kept if they are
        kept = sorted(sorted(kept, key=lambda i: (-outline.leaves[i], i))[:SKETCH])  # type: ignore[assignment]
    place = {i: row for row, i in enumerate(kept)}
    nodes = outline.nodes
    return [
        [place.get(outline.up[i], -1), outline.start[i], len(nodes[i].tokens), outline.leaves[i], outline.value(i)]
        for i in kept
    ]
