"""The tree under random growth: whatever is added, cut or grafted, what was handed out earlier stays what it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ramulus.core.store import dump
from ramulus.core.task import Task
from ramulus.core.tree import PER_TOKEN, Author, Node, Tree, column

TASK = Task(id="t", prompt=(1, 2, 3), text="1 2 3")
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "graft", "graft", "graft", "cut", "grade"]),
        st.integers(0, 60),  # which handle
        st.integers(0, 12),  # how deep
        st.integers(0, 6),  # how many tokens
        st.booleans(),  # finished and graded
    ),
    min_size=4,
    max_size=24,
)


def fill(node: Node, count: int, start: int) -> None:
    """Write `count` tokens into an empty node as an engine would; every number is unique, so a mix-up shows. Not every engine records all."""
    node.tokens = column(range(start, start + count), "i")
    if node.author is Author.POLICY:
        for k, name in enumerate(PER_TOKEN):
            setattr(node, name, column(token + (k + 1) / 10 for token in node.tokens))
        if start % 2:
            node.kept, node.entropy, node.temperature = None, None, start / 10
    node.signals = {"influence": column((token / 7 for token in node.tokens), "d")}
    node.version, node.newest = start % 5, start % 5 + start % 3


def along(node: Node) -> dict[str, list[Any]]:
    """Everything that belongs to the tokens from the root to the end of this node."""
    columns: dict[str, list[Any]] = {name: [] for name in ("token", "author", "version", "newest", "influence", *PER_TOKEN)}
    for above in node.line():
        blank = [None] * len(above.tokens)
        columns["token"] += above.tokens
        columns["author"] += [above.author] * len(above.tokens)
        columns["version"] += [above.version] * len(above.tokens)
        columns["newest"] += [above.newest] * len(above.tokens)
        columns["influence"] += above.signals.get("influence", blank)
        for name in PER_TOKEN:
            values = getattr(above, name)
            columns[name] += [values] * len(above.tokens) if isinstance(values, float) else values or blank
    assert all(len(column) == len(columns["token"]) for column in columns.values()), "a column does not fit its tokens"
    return columns


def snapshot(node: Node) -> tuple[Any, ...]:
    """What a cut or graft elsewhere may not change: the path, and what the end of the node says."""
    levels = sum(above.levels for above in node.line()) if not node.children else None
    return along(node), levels, node.id, node.author, node.finish, node.reward, dict(node.verdict), node.why


@dataclass
class Gardener:
    """Grows a tree move by move and holds every handle it ever got against what it was."""

    tree: Tree
    handles: list[Node] = field(default_factory=list)
    known: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    next_token: int = 100

    def play(self, moves: list[tuple[str, int, int, int, bool]]) -> None:
        self.handles = [self.tree.root]
        self.remember()
        for move, which, depth, count, ends in moves:
            node = self.handles[which % len(self.handles)]
            leaves = self.tree.leaves()
            self.tree.preorder()
            new = getattr(self, move)(node, depth, count, ends)
            self.check(leaves, grown={id(above) for above in new.line()} if new else set())
            self.handles += [n for n in self.tree.walk() if n not in self.known]
            self.remember()

    def remember(self) -> None:
        self.known = {node: snapshot(node) for node in self.handles}

    def grow(self, node: Node, count: int, ends: bool) -> None:
        fill(node, count, self.next_token)
        self.next_token += count
        if ends:
            node.finish, node.reward, node.verdict = "eos", float(node.id), {"correct": 1.0}

    def add(self, node: Node, depth: int, count: int, ends: bool) -> Node:
        text = node.prefix()
        new = self.tree.add(node, [], Author.EXPERT if depth % 3 == 0 else Author.POLICY)
        assert new.prefix() == text, "a new node must start where its parent ends"
        self.grow(new, count, ends)
        return new

    def graft(self, node: Node, depth: int, count: int, ends: bool) -> Node | None:
        text = node.prefix()
        if depth > len(text) - len(TASK.prompt):
            with pytest.raises(ValueError, match="inside the prompt"):
                self.tree.graft(node, depth)
            return None
        new = self.tree.graft(node, depth, why="fork")
        assert new.prefix() == text[: len(text) - depth], "a bud must start exactly `drop` tokens before its node's end"
        assert (list(new.tokens), new.children, new.finish, new.why) == ([], [], None, "fork")
        self.grow(new, count, ends)
        return new

    def cut(self, node: Node, depth: int, count: int, ends: bool) -> None:
        if node.parent is None:
            with pytest.raises(ValueError, match="cannot cut"):
                self.tree.cut(node, 0)
            return
        text, length, above = node.prefix(), len(node.tokens), node.parent
        head = self.tree.cut(node, depth % (length + 1))
        assert head.prefix() == text[: len(text) - length + depth % (length + 1)]
        assert (head.parent, head.finish, head.reward) == (above, None, None)

    def grade(self, node: Node, depth: int, count: int, ends: bool) -> None:
        if not node.children and node.parent is not None:
            node.finish, node.reward = "length", float(depth)
            self.known[node] = snapshot(node)

    def check(self, leaves: list[Node], grown: set[int]) -> None:
        """Every handle is as it was; those that still are leaves keep their order; links agree; values are means."""
        for node, was in self.known.items():
            now = snapshot(node)
            if was[1] is None or now[1] is None:  # no leaf, or no longer one: levels of an inner node belong to nobody
                was, now = (was[0], *was[2:]), (now[0], *now[2:])
            assert now == was, f"node {node.id} was changed"
        after = self.tree.leaves()
        lost = [leaf for leaf in leaves if leaf not in set(after)]
        assert all(id(leaf) in grown and leaf.finish is None for leaf in lost), "a leaf vanished"
        assert [leaf for leaf in after if leaf in set(leaves)] == [leaf for leaf in leaves if leaf not in lost]
        nodes, up, tips = self.tree.preorder()
        assert list(self.tree.walk()) == nodes == list(self.tree.root.walk()), "an earlier walk was taken for this one"
        assert [node.parent for node in nodes] == [nodes[place] if place >= 0 else None for place in up]
        assert after == [nodes[place] for place in tips if place] == [leaf for leaf in self.tree.root.leaves() if leaf.parent]
        ids = {node.id for node in nodes}
        assert len(ids) == len(nodes) == self.tree.serial, "a node is lost or an id is used twice"
        for node in nodes:
            assert all(child.parent is node for child in node.children)
            assert node.levels >= 0
        self.check_values(nodes)

    def check_values(self, nodes: list[Node]) -> None:
        below: dict[Node, list[float]] = {node: [] for node in nodes}
        for leaf in self.tree.leaves():
            for above in leaf.line() if leaf.reward is not None else []:
                below[above].append(leaf.reward)
        for node, rewards in below.items():
            assert self.tree.value(node) == (sum(rewards) / len(rewards) if rewards else None)


@settings(max_examples=500)
@given(MOVES)
def test_handles_keep_their_end(moves: list[tuple[str, int, int, int, bool]]) -> None:
    Gardener(Tree.plant(TASK)).play(moves)


class HeadKeepsIdentity(Tree):
    """The natural and wrong cut: the node in hand becomes the head, and a new node gets its end."""

    def cut(self, node: Node, at: int) -> Node:
        head = Tree.cut(self, node, at)
        for name in ("tokens", "signals", "id", "finish", "reward", "verdict", "levels", *PER_TOKEN):
            mine, other = getattr(node, name), getattr(head, name)
            setattr(node, name, other)
            setattr(head, name, mine)
        head.children, node.children = node.children, [head]
        node.parent, head.parent = head.parent, node
        assert node.parent is not None
        node.parent.children = [node if child is head else child for child in node.parent.children]
        for child in head.children:
            child.parent = head
        return node


class ForgetsColumns(Tree):
    """A cut that leaves a per-token column whole."""

    def cut(self, node: Node, at: int) -> Node:
        entropy = node.entropy
        head = Tree.cut(self, node, at)
        node.entropy = entropy
        return head


class CountsCuts(Tree):
    """A cut that counts as one more level of the leaves below."""

    def cut(self, node: Node, at: int) -> Node:
        levels = node.levels
        head = Tree.cut(self, node, at)
        node.levels = levels
        return head


class SwapsSiblings(Tree):
    """An add that puts the youngest first."""

    def add(self, parent: Node, tokens: list[int], author: Author, **fields: Any) -> Node:
        node = Tree.add(self, parent, tokens, author, **fields)
        assert node.parent is not None
        node.parent.children.reverse()
        return node


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (HeadKeepsIdentity, "was changed"),
        (ForgetsColumns, "does not fit its tokens"),
        (CountsCuts, "was changed"),
        (SwapsSiblings, "assert"),
    ],
)
def test_the_check_can_fail(kind: type[Tree], words: str) -> None:
    @settings(max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
    @given(MOVES)
    def wrong(moves: list[tuple[str, int, int, int, bool]]) -> None:
        Gardener(kind.plant(TASK)).play(moves)

    with pytest.raises(AssertionError, match=words):
        wrong()


def test_a_handle_survives_later_shallower_cuts() -> None:
    tree = Tree.plant(TASK)
    leaf = tree.add(tree.root, [10, 11, 12, 13, 14, 15], Author.POLICY, logprobs=[-0.5] * 6, finish="eos", reward=1.0)
    late = tree.graft(leaf, 1)
    early = tree.graft(leaf, 4)
    same = tree.graft(leaf, 4)
    assert leaf.prefix() == [1, 2, 3, 10, 11, 12, 13, 14, 15]
    assert late.prefix() == [1, 2, 3, 10, 11, 12, 13, 14]
    assert early.prefix() == same.prefix() == [1, 2, 3, 10, 11]
    assert early.parent is same.parent
    assert tree.leaves() == [leaf, late, early, same]
    assert sum(node.levels for node in leaf.line()) == 1
    assert sum(node.levels for node in late.line()) == 2


def test_growing_on_a_finished_leaf_keeps_it_and_stays_flat() -> None:
    tree = Tree.plant(TASK)
    leaf = tree.add(tree.root, [10, 11], Author.POLICY, logprobs=[-1.0, -2.0], finish="eos", reward=0.0)
    new = [tree.graft(leaf) for _ in range(5)]
    assert tree.leaves() == [leaf, *new]
    assert list(leaf.tokens) == []
    assert leaf.parent is not None
    assert leaf.parent.children == [leaf, *new]
    assert (list(leaf.parent.tokens), list(leaf.parent.logprobs), leaf.parent.finish) == ([10, 11], [-1.0, -2.0], None)
    assert leaf.response() == [10, 11]


@settings(max_examples=100)
@given(MOVES, MOVES)
def test_what_grows_on_a_copy_leaves_the_tree_as_it_was(before: list[Any], after: list[Any]) -> None:
    gardener = Gardener(Tree.plant(TASK))
    gardener.play(before)
    tree = gardener.tree
    was, twin = dump(tree), tree.copy()
    assert dump(twin) == was
    other = Gardener(twin, next_token=gardener.next_token)
    other.play(after)
    for node in twin.walk():
        node.signals["late"], node.verdict["late"] = column([1.0] * len(node.tokens), "d"), 1.0
    assert dump(tree) == was
    assert not {id(node) for node in tree.walk()} & {id(node) for node in twin.walk()}


def test_numbers_become_columns_where_a_node_is_made() -> None:
    node = Node(1, [1, 2], Author.POLICY, logprobs=[-0.1, -0.2], entropy=(0.5, 1), temperature=1, version=3, signals={"value": [0.1, 0.2]})
    assert [node.tokens.typecode, node.logprobs.typecode, node.entropy.typecode, node.signals["value"].typecode] == ["i", "f", "f", "d"]
    assert (node.kept, node.temperature, node.newest) == (None, 1.0, 3)
    assert [list(node.column(name)) for name in ("kept", "entropy", "temperature", "value", "none")] == [[], [0.5, 1.0], [1.0, 1.0], [0.1, 0.2], []]
    assert Node(2, node.tokens, Author.POLICY).tokens is node.tokens


@pytest.mark.parametrize(("drop", "words"), [(3, "inside the prompt"), (-1, "drop=-1")])
def test_a_bud_outside_the_response_is_refused(drop: int, words: str) -> None:
    tree = Tree.plant(TASK)
    leaf = tree.add(tree.root, [10, 11], Author.POLICY)
    with pytest.raises(ValueError, match=words):
        tree.graft(leaf, drop)


@pytest.mark.parametrize("at", [-1, 3])
def test_a_cut_outside_the_node_is_refused(at: int) -> None:
    tree = Tree.plant(TASK)
    leaf = tree.add(tree.root, [10, 11], Author.POLICY)
    with pytest.raises(ValueError, match=f"2 tokens at {at}"):
        tree.cut(leaf, at)


def test_a_chain_of_ten_thousand_nodes() -> None:
    tree = Tree.plant(TASK)
    node = tree.root
    for token in range(10_000):
        node = tree.add(node, [token], Author.POLICY)
    node.reward = 0.5
    assert [n.id for n in tree.walk()] == list(range(10_001))
    assert tree.leaves() == [node]
    assert len(node.prefix()) == 10_003
    assert tree.value(tree.root) == 0.5
    assert tree.graft(node, 9_999).prefix() == [1, 2, 3, 0]


def test_value_ignores_leaves_without_a_reward() -> None:
    tree = Tree.plant(TASK)
    assert tree.value(tree.root) is None
    assert tree.leaves() == []
    tree.add(tree.root, [1], Author.POLICY, reward=1.0)
    tree.add(tree.root, [2], Author.POLICY, reward=0.0)
    tree.add(tree.root, [3], Author.POLICY, finish="pruned")
    assert tree.value(tree.root) == 0.5
