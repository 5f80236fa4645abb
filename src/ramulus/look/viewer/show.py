"""Trees and texts for a terminal and a notebook; what a model wrote is made harmless first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text as Line
from rich.tree import Tree as Drawing

from ramulus.core import store
from ramulus.core.run_folder import NUMBERED, is_stage, natural
from ramulus.core.tree import Author, Node, Tree, called_correct
from ramulus.engine.engine import Decode
from ramulus.look.cost.ledger import Cost
from ramulus.look.stages import loose_files, step_files, tokenizer_of
from ramulus.look.terminal import new_console, printable, safe, styled
from ramulus.look.viewer.picture import Scale, clean, legend, paint, picture, scale_of
from ramulus.look.viewer.text import Text
from ramulus.look.viewer.tree_json import judgement, right

DEEP = 8  # forks above each other that are indented: with many more a terminal has no room for their texts


def draw_tree(tree: Tree, decode: Decode, width: int = 100) -> Drawing:
    """The tree with the text of every node, and the end and reward of every path.

    What goes on without a fork stands below, not further in; nor do branches below DEEP forks, which are marked.
    """
    text = f"  {safe(str(tree.task.text), width)}" if tree.task.text != tree.task.id else ""
    drawing = Drawing(_drawn(styled("bold", str(tree.task.id)) + text))
    places = {tree.root.id: (drawing, drawing, 0)}  # of each node where it hangs, what hangs below it, and how deep that is
    for node in tree.walk():
        if node.parent is not None:
            beside, below, depth = places[node.parent.id]
            flat = node.parent.parent is not None and (len(node.parent.children) == 1 or depth >= DEEP)
            here = beside if flat else below
            mark = "[dim]⋯[/dim] " if flat and depth >= DEEP and len(node.parent.children) > 1 else ""
            places[node.id] = here, here.add(_drawn(mark + _label(node, decode, width))), depth if flat else depth + 1
    return drawing


def _drawn(markup: str) -> Line:
    """A line of the drawing; words between colons stay words on any console."""
    return Line.from_markup(markup, emoji=False)


def _label(node: Node, decode: Decode, width: int) -> str:
    """One node in one line."""
    text = f"[dim]{len(node.tokens):4d}[/dim]  {safe(decode(node.tokens.tolist()), width)}"
    if node.author is Author.EXPERT:
        text += "  [cyan]demonstration[/cyan]"
    if node.children:
        return text
    known = isinstance(node.reward, int | float)
    reward = "" if node.reward is None else f"  reward {node.reward:g}" if known else f"  reward {printable(str(node.reward), width)}"
    called = called_correct(node)
    color = "default" if known and called is None else "green" if called else "red"
    return f"{text}  {styled(color, printable(str(node.finish or 'alive'), width) + reward)}"


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
        paths, judged = judgement(tree)
        marks = f", {right(judged)} right" if judged else ""
        answer = f" = {clean(str(tree.task.answer), 80)}" if tree.task.answer else ""
        return f"<b>{clean(tree.task.text, 240)}</b>{answer} <span style='opacity:.7'>{len(paths)} paths{marks}</span>"

    def rest(self) -> str:
        """How many trees are not shown."""
        return f"and {self.more} more: show them with limit={len(self.trees) + self.more}" if self.more else ""

    def __rich__(self) -> Group:
        head = [_drawn(styled("dim", self.place))] if self.place else []
        return Group(*head, *(draw_tree(tree, self.decode) for tree in self.trees), *([self.rest()] if self.more else []))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        console = new_console(file=StringIO(), width=160, color_system=None, force_jupyter=False)
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

    `what` is a tree, several, a file of them, the folder of an evaluation, or a Run or the folder of one, of which the last written step is
    shown unless `step` says. `decode` turns tokens into text; of a run it is that of its last checkpoint, of an evaluation that of its model,
    elsewhere tokens are shown as numbers. `colour`: value,
    credit, or a column such as entropy or temperature. `pick` says which trees are wanted, `limit` how many at most.
    Raises FileNotFoundError where a run has no trees, ValueError for a step without.
    """
    if limit < 1:
        raise ValueError(f"limit is how many trees are shown, at least 1, got {limit}")
    place = ""
    if isinstance(what, Tree):
        forest = [what]
    elif isinstance(what, str | Path) or hasattr(what, "folder"):
        file, others = _file_of(Path(getattr(what, "folder", what)).expanduser(), step)
        place, decode = f"{file}{others}", decode or decoder_of(file)
        forest = _of_step(file, step)
    else:
        forest = list(what)
    forest = [tree for tree in forest if pick is None or pick(tree)]
    return Shown(tuple(islice(forest, limit)), decode or _numbers, colour, max(len(forest) - limit, 0), place)


def _numbers(tokens: Sequence[int]) -> str:
    """Token ids with spaces between, which stand for the text where there is no tokenizer."""
    return " ".join(str(token) for token in tokens)


def _file_of(path: Path, step: int | None) -> tuple[Path, str]:
    """(file of trees, a remark on others beside it) of a file, a run, a stage, a folder of trees, or an evaluation."""
    if path.is_file():
        return path, ""
    inside = sorted((folder for folder in path.glob("*/") if is_stage(folder)), key=natural)
    folders = [(folder, files) for folder in (path, *inside) if (files := step_files(folder))]
    if folders:
        folder, files = folders[-1]
        if step is not None and step not in files:
            raise ValueError(f"{folder} has no trees of step {step}: it has those of {', '.join(map(str, files))}")
        return files[max(files) if step is None else step], ""
    loose = loose_files(path) if path.is_dir() else []
    if not loose:
        raise FileNotFoundError(
            f"there are no trees in {path}: name the folder of a run (with trees_every above 0) or of an evaluation, or a file of trees"
        )
    file, *others = sorted(loose, key=lambda file: not file.name.partition(".")[0].endswith("-tree"))
    return file, f" (also here: {', '.join(other.name for other in others)})" if others else ""


def _of_step(file: Path, step: int | None) -> list[Tree]:
    """The trees of a file; of one with any steps those of `step`, if one is named."""
    forest = list(store.read(file))
    if step is None or NUMBERED.match(file.name):
        return forest
    if not (chosen := [tree for tree in forest if tree.step == step]):
        known = ", ".join(map(str, sorted({tree.step for tree in forest})))
        raise ValueError(f"{file} has no trees of step {step}: it has those of {known}")
    return chosen


def decoder_of(file: Path) -> Decode | None:
    """Text of tokens by the tokenizer that belongs to a file of trees; None where there is none."""
    path = tokenizer_of(file.absolute())
    return partial(Text(path).whole, special=False) if path else None
