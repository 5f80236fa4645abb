"""The tree: prompt at the root, every response a path, every shared prefix stored once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

from ramulus.core.task import Task


class Author(IntEnum):
    """Who wrote a token; only POLICY and EXPERT are learned from.

    Example:
        >>> from ramulus import Author
        >>> Author.POLICY.name
        'POLICY'
    """

    PROMPT = 0
    POLICY = 1
    EXPERT = 2
    TOOL = 3


PER_TOKEN = ("logprobs", "kept", "entropy", "temperature")  # what a sampler records of each token


def column(values: Iterable[Any], kind: str = "f") -> array[Any]:
    """Numbers as an array of a kind: "i" token ids, "f" what was sampled, "d" signals; an array stays the one it is."""
    return values if isinstance(values, array) else array(kind, values)


@dataclass(eq=False, slots=True)
class Node:
    """A run of L tokens (L may be 0) with one author and one fate: all of them lie under the same leaves.

    Columns are arrays, which numpy and torch read as they are; any numbers become one where a node is made. They are replaced and never
    written into: a copy of a tree shares them.

    Example:
        >>> from ramulus import Author, Task, Tree
        >>> tree = Tree.plant(Task("t", (1, 2), "t"))
        >>> leaf = tree.add(tree.root, [3, 4], Author.POLICY, finish="eos")
        >>> list(leaf.prefix()), list(leaf.response())
        ([1, 2, 3, 4], [3, 4])
    """

    id: int  # serial in its tree, fixed when its bud is made
    tokens: array[int]  # [L] "i"
    author: Author
    logprobs: array[float] = field(default_factory=lambda: array("f"))  # [L] log mu(token), as really sampled; empty if not sampled
    kept: array[float] | None = None  # [L] log of the mass that top-p, top-k, min-p left; None: nothing was cut, or nobody recorded it
    entropy: array[float] | None = None  # [L] nats, of the untempered distribution; None if nobody recorded it
    temperature: array[float] | float = 1.0  # [L] that each token was sampled at, or the one number they share
    version: int = 0  # of the policy that sampled its first token
    newest: int = 0  # of the policy that sampled its last one
    versions: array[int] | None = None  # [L] "i", of the policy that sampled each token, where several did; None: all by `version`
    levels: int = 1  # segments that end here or were cut inside (arXiv 2508.17445 counts them)
    finish: str | None = None  # eos, answer, length, repetition, pruned; None while alive
    reward: float | None = None  # on leaves: weighted total; None is in no mean and no gradient
    verdict: dict[str, Any] = field(default_factory=dict)  # on leaves: parts of the reward, `correct`, the answer found
    signals: dict[str, array[float]] = field(default_factory=dict)  # [L] each, "d": what a rule asked for
    why: str = ""  # why it grew here, for the viewer
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.tokens, self.logprobs = column(self.tokens, "i"), column(self.logprobs)
        self.kept = None if self.kept is None else column(self.kept)
        self.entropy = None if self.entropy is None else column(self.entropy)
        self.temperature = float(self.temperature) if isinstance(self.temperature, int | float) else column(self.temperature)
        self.signals = {name: column(values, "d") for name, values in self.signals.items()}
        self.versions = None if self.versions is None else column(self.versions, "i")
        self.newest = max(self.version, self.newest)

    def column(self, name: str) -> Sequence[float]:
        """[L] of a signal or of what was sampled; empty where it was not recorded."""
        values = getattr(self, name) if name in PER_TOKEN else self.signals.get(name)
        if isinstance(values, float):
            return [values] * len(self.logprobs)
        return () if values is None else values

    def span(self, versions: array[int]) -> None:
        """Take the versions of its tokens [L], which rise, for its own."""
        self.versions = versions
        self.version, self.newest = (versions[0], versions[-1]) if versions else (self.version, self.newest)

    def line(self) -> list[Node]:
        """The nodes from the root down to this one."""
        nodes = [self]
        while (above := nodes[-1].parent) is not None:
            nodes.append(above)
        return nodes[::-1]

    def prefix(self) -> list[int]:
        """All tokens from the root to the end of this node, prompt included."""
        tokens = array("i")
        for node in self.line():
            tokens += node.tokens
        return tokens.tolist()

    def response(self) -> list[int]:
        """All tokens from the root to the end of this node, prompt excluded."""
        tokens = array("i")
        for node in self.line():
            if node.author is not Author.PROMPT:
                tokens += node.tokens
        return tokens.tolist()

    def leaves(self) -> list[Node]:
        """The leaves at or below this node, in preorder."""
        leaves, stack = [], [self]
        while stack:
            node = stack.pop()
            if node.children:
                stack += node.children[::-1]
            else:
                leaves.append(node)
        return leaves

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in preorder; safe for deep trees."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            if node.children:
                stack += node.children[::-1]


def correct(leaf: Node) -> float:
    """Whether a graded path solves its task: the verdict's `correct`, or else a reward above 0."""
    return float(leaf.verdict["correct"]) if "correct" in leaf.verdict else float((leaf.reward or 0.0) > 0)


def called_correct(leaf: Node) -> float | None:
    """Whether a reward called a path correct; None where none said so, as those do that give a number on a scale."""
    return float(leaf.verdict["correct"]) if "correct" in leaf.verdict else None


def correctness(leaves: Iterable[Node]) -> list[float]:
    """Whether each graded path is correct; empty where no reward calls any of them so. One of which none says it, of others some, is not."""
    graded = [leaf for leaf in leaves if leaf.verdict]
    judged = any("correct" in leaf.verdict for leaf in graded)
    return [float(leaf.verdict.get("correct", 0.0)) for leaf in graded] if judged else []


def origin(leaf: Node) -> Node:
    """Where the policy's own part of a path begins: at the end of the prompt, or of the part of a demonstration that it goes on from."""
    return next(node for node in reversed(leaf.line()) if node.author in (Author.PROMPT, Author.EXPERT))


def demonstrations(tree: Tree) -> list[Node]:
    """The demonstrations to learn from; one that failed its check has no reward and is none of them."""
    return [leaf for leaf in tree.leaves() if leaf.author is Author.EXPERT and leaf.reward is not None]


class Preorder(NamedTuple):
    """The nodes of a tree, each before those below it."""

    nodes: list[Node]
    up: list[int]  # of each the place of its parent in `nodes`, -1 for the root
    tips: list[int]  # the places of the leaves


@dataclass(eq=False, slots=True)
class Tree:
    """One task and every path grown for it in one visit. Nodes are hung and cut by `add`, `cut` and `graft` alone, which keep ids and walks right.

    Example:
        >>> from ramulus import Author, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> long = tree.add(tree.root, [2, 3, 4], Author.POLICY)
        >>> fork = tree.graft(long, drop=2)  # a new path, two tokens before the end of the other
        >>> [len(leaf.prefix()) for leaf in tree.leaves()]
        [4, 2]
    """

    task: Task
    root: Node
    seed: int = 0
    step: int = 0
    visit: int = 0
    serial: int = 1  # the next node id
    rounds: int = 0  # rounds of growth so far
    fresh: int = 0  # serial when the last round began: leaves with id >= fresh grew in it
    unexpanded: tuple[int, ...] = ()  # ids of the paths that a schedule lets nothing grow from
    kept_order: tuple[int, Preorder] | None = field(default=None, init=False, repr=False)  # `preorder` as of a `serial`, which every change raises
    kept_leaves: tuple[int, list[Node]] | None = field(default=None, init=False, repr=False)  # the same of `leaves`

    @classmethod
    def plant(cls, task: Task, seed: int = 0, step: int = 0, visit: int = 0) -> Tree:
        """A tree that holds the prompt alone."""
        return cls(task, Node(0, column(task.prompt, "i"), Author.PROMPT, levels=0), seed, step, visit)

    def add(self, parent: Node, tokens: Iterable[int], author: Author, **fields: Any) -> Node:
        """Hang a new node under the end of `parent`; a finished leaf stays a leaf, its end kept as an empty node."""
        if parent.finish is not None or (parent.reward is not None and not parent.children):
            if parent.parent is not None and not parent.tokens and not parent.levels:
                parent = parent.parent  # an end that was kept before: all that grow here are siblings of it
            else:
                parent = self.cut(parent, len(parent.tokens))
        node = Node(self.serial, column(tokens, "i"), author, parent=parent, **fields)
        self.serial += 1
        parent.children.append(node)
        return node

    def cut(self, node: Node, at: int) -> Node:
        """Insert a head above `node` with its first `at` tokens; `node` keeps its end, children, reward and identity.

        Returns the head. Raises ValueError for an `at` outside [0, L] or a cut of the root.
        """
        if node.parent is None or not 0 <= at <= len(node.tokens):
            place = f"node {node.id} of {len(node.tokens)} tokens at {at}"
            raise ValueError(f"cannot cut {place}: the root is never cut, and 0 <= at <= its length")
        head = Node(self.serial, node.tokens[:at], node.author, version=node.version, newest=node.newest, parent=node.parent)
        head.levels = min(node.levels, 1)
        self.serial += 1
        for name in PER_TOKEN:
            values = getattr(node, name)
            whole = values is None or isinstance(values, float)
            setattr(head, name, values if whole else values[:at])
            setattr(node, name, values if whole else values[at:])
        head.signals = {name: values[:at] for name, values in node.signals.items()}
        node.signals = {name: values[at:] for name, values in node.signals.items()}
        if node.versions is not None:
            head.span(node.versions[:at])
            node.span(node.versions[at:])
        node.tokens = node.tokens[at:]
        node.levels -= head.levels
        siblings = node.parent.children
        siblings[siblings.index(node)] = head
        head.children = [node]
        node.parent = head
        return head

    def graft(self, node: Node, drop: int = 0, why: str = "", author: Author = Author.POLICY) -> Node:
        """Make an empty, living node that grows `drop` tokens before the end of `node`.

        Walks up where `drop` reaches above the node (an earlier cut may have shortened it). Raises ValueError for a
        negative `drop` and for one that reaches into the prompt.
        """
        if drop < 0:
            raise ValueError(f"a bud lies at or before the end of its node, got drop={drop}")
        wanted = drop
        while node.parent is not None and drop >= len(node.tokens) and drop > 0:
            drop -= len(node.tokens)
            node = node.parent
        if node.parent is None and drop > 0:
            raise ValueError(f"a bud {wanted} tokens before the end of its node would lie inside the prompt")
        if drop > 0:
            node = self.cut(node, len(node.tokens) - drop)
        return self.add(node, [], author, why=why)

    def copy(self) -> Tree:
        """A tree of its own to grow on, with the same columns: they are shared, as nothing writes into one."""
        copies: dict[int, Node] = {}
        for node in self.walk():
            twin = copies[node.id] = copy(node)
            twin.verdict, twin.signals, twin.children = dict(node.verdict), dict(node.signals), []
            if node.parent is not None:
                twin.parent = copies[node.parent.id]
                twin.parent.children.append(twin)
        return replace(self, root=copies[self.root.id])

    def preorder(self) -> Preorder:
        """Every node in preorder; kept until the tree grows or is cut, as it is asked for many times, so nobody writes into it."""
        if self.kept_order is None or self.kept_order[0] != self.serial:
            self.kept_order = self.serial, self._preorder()
        return self.kept_order[1]

    def _preorder(self) -> Preorder:
        """Walk the whole tree: its nodes in preorder, the place of the parent of each, the places of the leaves."""
        nodes: list[Node] = []
        up: list[int] = []
        tips: list[int] = []
        stack: list[tuple[Node, int]] = [(self.root, -1)]
        while stack:
            node, above = stack.pop()
            place = len(nodes)
            nodes.append(node)
            up.append(above)
            if node.children:
                stack += [(child, place) for child in node.children[::-1]]
            else:
                tips.append(place)
        return Preorder(nodes, up, tips)

    def walk(self) -> Iterator[Node]:
        """Every node in preorder, the root first."""
        return iter(self.preorder().nodes)

    def leaves(self) -> list[Node]:
        """Every leaf in preorder; the bare root is no leaf."""
        if self.kept_leaves is None or self.kept_leaves[0] != self.serial:
            self.kept_leaves = self.serial, self.root.leaves() if self.root.children else []
        return self.kept_leaves[1].copy()

    def value(self, node: Node) -> float | None:
        """Mean reward of the graded leaves at or below `node`; None where there is none."""
        rewards = [leaf.reward for leaf in node.leaves() if leaf.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None
