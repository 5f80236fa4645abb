"""Trees and texts for a terminal; what a model wrote is made harmless first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.tree import Tree as Drawing

from ramify.core.tree import Author, Node, Tree
from ramify.look.ledger import Cost

Decode = Callable[[Sequence[int]], str]


def safe(text: str, width: int | None = None) -> str:
    """One line without control characters or rich markup; the middle is left out beyond `width` characters."""
    plain = text.replace("\n", "⏎")
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in plain)
    if width is not None and len(plain) > width:
        plain = plain[: width * 2 // 3] + " … " + plain[len(plain) - width // 3 :]
    return escape(plain)


def draw(tree: Tree, decode: Decode, width: int = 100) -> Drawing:
    """The tree with the text of every node, and the end and reward of every path."""
    made = Drawing(f"[bold]{safe(tree.task.id)}[/bold]  {safe(tree.task.text, width)}")
    branches = {tree.root.id: made}
    for node in tree.walk():
        if node.parent is not None:
            branches[node.id] = branches[node.parent.id].add(label(node, decode, width))
    return made


def label(node: Node, decode: Decode, width: int) -> str:
    """One node in one line."""
    text = f"[dim]{len(node.tokens):4d}[/dim]  {safe(decode(node.tokens), width)}"
    if node.author is Author.EXPERT:
        text += "  [cyan]demonstration[/cyan]"
    if node.children:
        return text
    reward = "" if node.reward is None else f"  reward {node.reward:g}"
    color = "green" if (node.reward or 0) > 0 else "red"
    return f"{text}  [{color}]{node.finish or 'alive'}{reward}[/{color}]"


def bill(spent: Cost) -> str:
    """What some trees cost, in one sentence."""
    return (
        f"{spent.trees} {'tree' if spent.trees == 1 else 'trees'}, {spent.paths} paths: {spent.sampled} tokens sampled, {spent.reused} reused "
        f"({spent.reuse_ratio:.2f} trajectory tokens for each sampled), {spent.pruned} pruned"
    )
