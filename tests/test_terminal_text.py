"""Text of models in a terminal: harmless, and otherwise as it was written."""

from __future__ import annotations

from io import StringIO

import pytest

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.look.terminal import new_console, safe, styled
from ramulus.look.viewer.show import draw_tree

TEXTS = [
    "the ratio a:b:c", "x[:x:]", "x:m:y", "a\\", "a\\\\", "a\\\\\\", "\\", "[bold]x\\[/bold]", "全角\u3000a\u00a0b", "👩\u200d🔬", "[/]", "\\[a]\\",
]  # fmt: skip


def shown(markup: object) -> str:
    console = new_console(file=StringIO(), width=200, color_system=None)
    console.print(markup, highlight=False)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stands_as_it_was_written(text: str) -> None:
    assert shown(safe(text)) == f"{text}\n"
    assert shown(f"{safe(text)} [red]after[/red]") == f"{text} after\n"
    assert shown(f"{styled('bold', text)}[red]after[/red]") == f"{text}after\n"
    tree = Tree.plant(Task("id\\", (1,), text))
    leaf = tree.add(tree.root, [2], Author.POLICY, finish="eos")
    leaf.reward = text  # type: ignore[assignment]
    drawn = shown(draw_tree(tree, lambda tokens: text))
    assert "id\\" in drawn
    assert drawn.count(text) >= 3


@pytest.mark.parametrize("sign", ["\x1b", "\x07", "\u202e", "\u2066", "\u2028", "\ud800", "\x85"])
def test_what_moves_or_reorders_is_spelled(sign: str) -> None:
    assert sign not in safe(f"a{sign}b")
    assert safe(f"a{sign}b") == f"a\\x{ord(sign):02x}b"


def test_line_breaks_and_tabs_are_signs() -> None:
    assert safe("a\nb\tc") == "a⏎b⇥c"
