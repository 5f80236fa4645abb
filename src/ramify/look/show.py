"""Trees and texts for a terminal and a notebook; what a model wrote is made harmless first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.tree import Tree as Drawing

from ramify.core import store
from ramify.core.tree import Author, Node, Tree, correct
from ramify.look.ledger import Cost
from ramify.look.picture import Scale, clean, legend, paint, picture, scale_of

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


@dataclass(frozen=True, repr=False)
class Shown:
    """Some trees to look at: pictures in a notebook, text in a terminal."""

    trees: tuple[Tree, ...]
    decode: Decode
    colour: str = "value"
    more: int = 0  # trees that are left out
    place: str = ""  # where they come from

    def _repr_html_(self) -> str:
        """One self-contained piece of HTML without scripts; its text takes the colour of the page, dark or light."""
        try:
            scale = scale_of(self.trees, self.colour)
            drawn = [self.drawn(tree, scale) for tree in self.trees]
        except ValueError as error:
            drawn = [f"<div>{clean(str(error))}</div>"]
        parts = [
            f'<div style="margin:.8em 0 .1em">{self.heading(tree)}</div>{one}' for tree, one in zip(self.trees, drawn)
        ]
        head = f'<div style="opacity:.7">{clean(self.place)}</div>' if self.place else ""
        return f'<div style="font:13px/1.4 system-ui,sans-serif">{head}{"".join(parts)}<div style="opacity:.7">{self.rest()}</div></div>'

    def drawn(self, tree: Tree, scale: Scale) -> str:
        """The picture of one tree, and its legend."""
        how = paint(tree, self.colour, scale)
        return f'{picture(tree, self.decode, how)}<div style="opacity:.7;font-size:11px">{legend(how)}</div>'

    def heading(self, tree: Tree) -> str:
        """The task of a tree, and how its paths did."""
        paths = [leaf for leaf in tree.leaves() if leaf.author is Author.POLICY]
        judged = [leaf for leaf in paths if leaf.verdict or leaf.reward is not None]
        right = f", {sum(correct(leaf) > 0 for leaf in judged)} right" if judged else ""
        answer = f" = {clean(str(tree.task.answer), 80)}" if tree.task.answer else ""
        return f"<b>{clean(tree.task.text, 240)}</b>{answer} <span style='opacity:.7'>{len(paths)} paths{right}</span>"

    def rest(self) -> str:
        """How many trees are not shown."""
        return f"and {self.more} more: show them with limit={len(self.trees) + self.more}" if self.more else ""

    def __rich__(self) -> Group:
        head = [f"[dim]{safe(self.place)}[/dim]"] if self.place else []
        return Group(*head, *(draw(tree, self.decode) for tree in self.trees), *([self.rest()] if self.more else []))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=160, color_system=None, force_jupyter=False)
        console.print(self)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def show(
    what: Any,
    decode: Decode | None = None,
    step: int | None = None,
    colour: str = "value",
    limit: int = 6,
    pick: Callable[[Tree], bool] | None = None,
) -> Shown:
    """Trees to look at, as pictures in a notebook and as text in a terminal.

    `what` is a tree, several, a file of them, or a Run or the folder of one, of which the last written step is shown unless `step` says.
    `decode` turns tokens into text; of a run it is that of its last checkpoint, elsewhere tokens are shown as numbers. `colour`: value,
    credit, or a column such as entropy or temperature. `pick` says which trees are wanted, `limit` how many at most.
    Raises FileNotFoundError where a run has no trees, ValueError for a step without.
    """
    if limit < 1:
        raise ValueError(f"limit is how many trees are shown, at least 1, got {limit}")
    place = ""
    if isinstance(what, Tree):
        forest = [what]
    elif isinstance(what, str | Path) or hasattr(what, "folder"):
        file, folder = trees_of(Path(getattr(what, "folder", what)).expanduser(), step)
        place, decode = str(file), decode or decoder_of(folder)
        forest = list(store.read(file))
    else:
        forest = list(what)
    forest = [tree for tree in forest if pick is None or pick(tree)]
    return Shown(tuple(islice(forest, limit)), decode or numbers, colour, max(len(forest) - limit, 0), place)


def numbers(tokens: Sequence[int]) -> str:
    """Tokens without a tokenizer."""
    return " ".join(str(token) for token in tokens)


def trees_of(path: Path, step: int | None) -> tuple[Path, Path]:
    """(file of trees, folder of the stage it belongs to) of a file, the folder of a run or of a stage, or a folder of trees."""
    if path.is_file():
        return path, path.parent.parent
    found = [folder for folder in (path, *sorted(path.glob("*/"))) if any(folder.glob("trees/*.jsonl"))]
    folder = found[-1] if found else path.parent
    files = {
        int(file.stem): file for file in (folder / "trees" if found else path).glob("*.jsonl") if file.stem.isdigit()
    }
    if not files:
        raise FileNotFoundError(
            f"there are no trees in {path}: name the folder of a run (with trees_every above 0), or a file of trees"
        )
    if step is not None and step not in files:
        raise ValueError(f"{folder} has no trees of step {step}: it has those of {', '.join(map(str, sorted(files)))}")
    return files[step if step is not None else max(files)], folder


def decoder_of(folder: Path) -> Decode | None:
    """Text of tokens by the tokenizer of a run's last checkpoint; None where there is none."""
    models = sorted(folder.glob("checkpoints/step-*/model"))
    if not models:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[-1])
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
