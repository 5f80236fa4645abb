"""Credit of nodes where a demonstration helped: what began there is compared with what began there."""

from __future__ import annotations

import math

import pytest

from growing import plant
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.learn.advantage.global_local import GlobalLocal


def path(tree: Tree, above: Node, reward: float, size: int = 2) -> Node:
    return tree.add(above, [1] * size, Author.POLICY, finish="eos", reward=reward)


def helped() -> tuple[Tree, dict[str, Node]]:
    """Alone: a top with a right and a wrong path. From half a demonstration: a top with two right and a wrong path, and a wrong one beside it."""
    tree = plant()
    top = tree.add(tree.root, [1, 1], Author.POLICY)
    alone = [path(tree, top, reward) for reward in (1.0, 0.0)]
    shown = tree.add(tree.root, [5] * 6, Author.EXPERT, finish="eos", reward=1.0)
    bud = tree.graft(shown, 3)
    bud.tokens = column([1, 1], "i")
    hints = [path(tree, bud, reward) for reward in (1.0, 1.0, 0.0)]
    assert bud.parent is not None
    lone = path(tree, bud.parent, 0.0)
    return tree, {"top": top, "right": alone[0], "bud": bud, "hint": hints[0], "miss": hints[2], "lone": lone}


@pytest.mark.parametrize("form", ["paper", "released"])
def test_help_changes_nothing_for_what_was_written_alone(form: str) -> None:
    tree, nodes = helped()
    (credit,) = GlobalLocal(form)([tree])
    bare = plant()
    top = bare.add(bare.root, [1, 1], Author.POLICY)
    right, wrong = (path(bare, top, reward) for reward in (1.0, 0.0))
    (alone,) = GlobalLocal(form)([bare])
    assert credit.node is not None
    assert alone.node is not None
    assert credit.node[nodes["top"].id] == alone.node[top.id]
    assert credit.node[nodes["right"].id] == alone.node[right.id]
    assert alone.node[wrong.id] == -alone.node[right.id]


def test_paths_with_help_are_a_tree_of_their_own() -> None:
    tree, nodes = helped()
    (credit,) = GlobalLocal()([tree])
    whole, value = 2 / 4, 2 / 3  # of the four paths that began in the demonstration; of the three below their fork
    assert credit.node is not None
    assert credit.node[nodes["bud"].id] == pytest.approx(2 * (value - whole) / math.sqrt(3))
    assert credit.node[nodes["hint"].id] == pytest.approx(1 - whole + 1 - value)
    assert credit.node[nodes["miss"].id] == pytest.approx(0 - whole + 0 - value)
    assert credit.node[nodes["lone"].id] == pytest.approx(2 * (0 - whole))
    assert nodes["lone"].id not in credit.trained(), "nothing branches from it, as from a first path"
    assert nodes["hint"].id in credit.trained()
    assert nodes["lone"].id in GlobalLocal(unbranched=True)([tree])[0].trained()
    assert not [node for node in tree.walk() if node.author is Author.EXPERT and node.id in credit.node]
