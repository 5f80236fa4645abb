"""A tree as an SVG picture: x is the token position, thickness the number of paths below, colour their value or a recorded number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from ramulus.core.tree import PER_TOKEN, Author, Node, Tree, called_correct
from ramulus.engine.engine import Decode
from ramulus.look.terminal import printable

RGB = tuple[int, int, int]

WORSE, BETWEEN, BETTER = (
    (217, 110, 48),
    (150, 150, 158),
    (24, 150, 136),
)  # legible on white and on black, told apart by the colour-blind
COLD, HOT = (74, 130, 214), (212, 62, 62)
_LEVELS = 16  # of a colour scale: neighbours of nearly the same number share one stroke
TIP = 600  # characters of a tooltip; the middle is left out beyond
LETTER = 6.1  # px, the width of a letter of a label
_WIDTH = 760  # px
NUMBER = 36  # px on the right where paths end in a number
LEFT, RIGHT, TOP, BOTTOM = 18, 16, 14, 22  # px around the paths: the prompt's stub on the left, the ruler below
THEME = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


def clean(text: str, most: int | None = None) -> str:
    """Text for HTML and XML: escaped, without control characters; the middle is left out beyond `most` characters."""
    return escape(printable(text, most))


@dataclass(frozen=True)
class Scale:
    """Numbers between `low` and `high` -> colours, grey where there is none."""

    low: float
    high: float
    stops: tuple[RGB, RGB, RGB]

    def __call__(self, value: float | None) -> str:
        """The colour of a number, one of LEVELS + 1."""
        if value is None or not math.isfinite(value):
            return "#8886"
        share = 0.5 if self.high <= self.low else min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        share = round(share * _LEVELS) / _LEVELS * 2
        near, far = self.stops[int(share > 1)], self.stops[1 + int(share > 1)]
        part = share - int(share > 1)
        return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(near, far, strict=True))


@dataclass(frozen=True)
class Paint:
    """What a picture is coloured by, and its scale; `of` gives one number a token, or one for the whole node."""

    name: str
    scale: Scale
    of: Callable[[Node], Sequence[float | None]]


def paint(tree: Tree, colour: str, scale: Scale | None = None) -> Paint:
    """How to colour a tree: by "value" (mean reward below), "credit" (of the leaves below, summed over terms), or a column of its tokens.

    Columns are logprobs, kept, entropy, temperature and every signal. `scale` is that of several trees where they are to be compared.
    Raises ValueError for a column that no node has.
    """
    scale = scale or scale_of([tree], colour)
    if colour not in SUMMED:
        return Paint(colour, scale, lambda node: node.column(colour) or [None])
    name, of = SUMMED[colour]
    means = averages(tree, of)
    return Paint(name, scale, lambda node: [means[node.id]])


def scale_of(trees: Sequence[Tree], colour: str) -> Scale:
    """One scale for several trees."""
    if colour in SUMMED:
        _, of = SUMMED[colour]
        means = [value for tree in trees for value in averages(tree, of).values() if value is not None]
        if colour == "value":
            return Scale(min([0.0, *means]), max([1.0, *means]), (WORSE, BETWEEN, BETTER))
        most = max(map(abs, means), default=1.0) or 1.0
        return Scale(-most, most, (WORSE, BETWEEN, BETTER))
    nodes = [node for tree in trees for node in tree.walk()]
    values = [value for node in nodes for value in node.column(colour)]
    if not values:
        known = sorted({name for node in nodes for name in (*PER_TOKEN, *node.signals) if node.column(name)})
        raise ValueError(f"no token has {colour!r}: colour by {', '.join((*SUMMED, *known))}")
    return Scale(min(values), max(values), (COLD, BETWEEN, HOT))


def credit(leaf: Node) -> float | None:
    """What a leaf earned, summed over the terms that trained it; None where none did."""
    values = [value for name, value in leaf.verdict.items() if name.startswith("credit/")]
    return math.fsum(values) if values else None


SUMMED: dict[str, tuple[str, Callable[[Node], float | None]]] = {
    "value": ("mean reward of the paths below", lambda leaf: leaf.reward),
    "credit": ("mean credit of the paths below", credit),
}
"""Colours that come from the leaves: what each is called, and the number of a leaf."""


def averages(tree: Tree, of: Callable[[Node], float | None]) -> dict[int, float | None]:
    """Node id -> the mean of a number over the leaves at or below it that have one."""
    sums: dict[int, tuple[float, int]] = {}
    for node in reversed(list(tree.walk())):
        value = of(node) if not node.children else None
        parts = [sums[child.id] for child in node.children] or [(value or 0.0, int(value is not None))]
        sums[node.id] = (sum(total for total, _ in parts), sum(count for _, count in parts))
    return {name: total / count if count else None for name, (total, count) in sums.items()}


@dataclass(frozen=True)
class _Place:
    """Where a node lies: tokens before it, leaves below, and px: the middle of its band where it leaves its parent, and after."""

    start: int
    leaves: int
    near: float
    middle: float


def places(tree: Tree, lane: float, unit: float) -> dict[int, _Place]:
    """Every node's place: leaves in lanes of `lane` px, a node in the middle of its leaves, `unit` px thick for each of them."""
    nodes = list(tree.walk())
    count: dict[int, int] = {}
    middle: dict[int, float] = {}
    lanes = sum(not node.children for node in nodes)
    for node in reversed(nodes):
        if not node.children:
            lanes -= 1
            count[node.id], middle[node.id] = 1, TOP + (lanes + 0.5) * lane
        else:
            count[node.id] = sum(count[child.id] for child in node.children)
            middle[node.id] = (middle[node.children[0].id] + middle[node.children[-1].id]) / 2
    placed = {tree.root.id: _Place(0, count[tree.root.id], middle[tree.root.id], middle[tree.root.id])}
    for node in nodes:
        here = placed[node.id]
        at = here.middle - here.leaves * unit / 2
        start = here.start + (len(node.tokens) if node.parent is not None else 0)
        for child in node.children:
            thick = count[child.id] * unit
            placed[child.id] = _Place(start, count[child.id], at + thick / 2, middle[child.id])
            at += thick
    return placed


class Canvas:
    """One tree on its way to a picture."""

    def __init__(self, tree: Tree, decode: Decode, paint: Paint) -> None:
        self.tree, self.decode, self.paint = tree, decode, paint
        self.value = averages(tree, lambda leaf: leaf.reward)
        leaves = max(len(tree.leaves()), 1)
        self.lane = min(26.0, max(520.0 / leaves, 3.0))
        self.unit = min(5.0, self.lane * 0.6, 90.0 / leaves + 0.5)
        self.height = TOP + BOTTOM + leaves * self.lane
        self.places = places(tree, self.lane, self.unit)
        ends = [self.places[node.id].start + len(node.tokens) for node in tree.walk() if node.parent is not None]
        self.longest = max([*ends, 1])
        scored = any(called_correct(leaf) is None and isinstance(leaf.reward, int | float) for leaf in tree.leaves())
        self.per = (_WIDTH - LEFT - (NUMBER if scored else RIGHT)) / self.longest

    def x(self, token: float) -> float:
        """px of a token position, counted from the end of the prompt."""
        return LEFT + token * self.per

    def elements(self) -> Iterator[str]:
        """Everything in the picture: the ruler, then the nodes, those of fewer leaves above those of more."""
        yield from self.ruler()
        yield self.prompt()
        for node in self.tree.walk():
            if node.parent is not None:
                yield self.band(node)
        for leaf in self.tree.leaves():
            yield self.end(leaf)

    def prompt(self) -> str:
        """The stub of the prompt."""
        place = self.places[self.tree.root.id]
        tip = f"<title>prompt, {len(self.tree.root.tokens)} tokens\n{clean(self.tree.task.text, TIP)}</title>"
        size = place.leaves * self.unit
        return f'<rect x="2" y="{place.middle - size / 2:.1f}" width="{LEFT - 2}" height="{size:.1f}" fill="currentColor" opacity=".45">{tip}</rect>'

    def band(self, node: Node) -> str:
        """A node as a band that leaves its parent at its place among its siblings and swings to the middle of its own leaves."""
        place, thick = self.places[node.id], self.places[node.id].leaves * self.unit
        begin, end = self.x(place.start), self.x(place.start + len(node.tokens))
        bend = begin + min(end - begin, max(14.0, 0.8 * abs(place.middle - place.near)))
        half = (begin + bend) / 2
        curve = f"M{begin:.1f} {place.near:.1f}C{half:.1f} {place.near:.1f} {half:.1f} {place.middle:.1f} {bend:.1f} {place.middle:.1f}"
        parts = []
        for colour, first, last in self.runs(node):
            a, b = self.x(place.start + first), self.x(place.start + last)
            path = (curve if first == 0 else f"M{max(a, bend):.1f} {place.middle:.1f}") + f"H{max(b, bend):.1f}"
            if first == 0 or b > bend:
                parts.append(f'<path d="{path}" stroke="{colour}"/>')
        style = (
            ' stroke-dasharray="9 2"'
            if node.author is Author.EXPERT
            else ' opacity=".55"'
            if node.author is Author.TOOL
            else ""
        )
        return f'<g fill="none" stroke-width="{thick:.1f}"{style}>{"".join(parts)}{self.tip(node)}</g>{self.label(node, bend, end)}'

    def runs(self, node: Node) -> list[tuple[str, int, int]]:
        """(colour, first token, one past the last) of stretches of one colour."""
        values = self.paint.of(node)
        if len(values) != len(node.tokens):
            return [(self.paint.scale(values[0] if values else None), 0, len(node.tokens))]
        pieces, at = [], 0
        for colour, stretch in groupby(self.paint.scale(value) for value in values):
            size = len(list(stretch))
            pieces.append((colour, at, at + size))
            at += size
        return pieces or [(self.paint.scale(None), 0, 0)]

    def tip(self, node: Node) -> str:
        """What the mouse finds on a node."""
        place, value = self.places[node.id], self.value[node.id]
        parts = [f"{len(node.tokens)} tokens", f"{place.leaves} {'path' if place.leaves == 1 else 'paths'}"]
        parts += [] if value is None else [f"reward {value:.3g}"]
        parts += ["demonstration"] if node.author is Author.EXPERT else [clean(node.why)] if node.why else []
        lines = [
            f"{name} {part:.3g}" if isinstance(part, float) else f"{name} {part}" for name, part in node.verdict.items()
        ]
        more = [clean(", ".join(lines), TIP)] if lines else []
        return "<title>" + "\n".join([" · ".join(parts), *more, clean(self.decode(node.tokens.tolist()), TIP)]) + "</title>"

    def label(self, node: Node, begin: float, end: float) -> str:
        """The text of a node above its band, as much as fits; none where lanes are narrow."""
        place, room = self.places[node.id], int((end - begin) / LETTER)
        text = self.decode(node.tokens.tolist()).replace("\n", "⏎")
        if self.lane < 16 or room < 1 or not text.strip():
            return ""
        text = text if len(text) <= room else text[: room - 1] + "…" if room > 3 else ""
        y = place.middle - place.leaves * self.unit / 2 - 2.5
        return f'<text x="{begin:.1f}" y="{y:.1f}">{clean(text)}</text>' if text else ""

    def end(self, leaf: Node) -> str:
        """A mark where a path ends: full where it is right, hollow where it is wrong, its reward where nobody said, a bar at the limit, a cross where
        it was pruned."""
        place = self.places[leaf.id]
        x, y, size = self.x(place.start + len(leaf.tokens)) + 4, place.middle, min(3.5, self.lane / 2.5)
        colour, tip = self.paint.scale(self.paint.of(leaf)[-1] if self.paint.of(leaf) else None), self.tip(leaf)
        if leaf.finish == "pruned":
            d = f"M{x - size:.1f} {y - size:.1f}l{2 * size:.1f} {2 * size:.1f}m0 {-2 * size:.1f}l{-2 * size:.1f} {2 * size:.1f}"
            return f'<path d="{d}" stroke="currentColor" stroke-width="1.4" fill="none">{tip}</path>'
        if leaf.finish == "length":
            return f'<path d="M{x:.1f} {y - size:.1f}v{2 * size:.1f}" stroke="{colour}" stroke-width="2.2">{tip}</path>'
        called = called_correct(leaf)
        if called is None and isinstance(leaf.reward, int | float):
            if self.lane < 9:
                return ""
            return f'<text x="{x - 2:.1f}" y="{y + 3.5:.1f}" fill="{colour}">{leaf.reward:.2g}{tip}</text>'
        fill = colour if called else "none"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" fill="{fill}" stroke="{colour}" stroke-width="1.4">{tip}</circle>'

    def ruler(self) -> Iterator[str]:
        """Token positions below the paths."""
        y = self.height - BOTTOM + 5
        step = next(a * 10**b for b in range(9) for a in (1, 2, 5) if a * 10**b * self.per >= 56)
        yield f'<path d="M{LEFT} {y:.1f}H{self.x(self.longest):.1f}" stroke="currentColor" opacity=".35"/>'
        for at in range(0, self.longest + 1, step):
            yield f'<text x="{self.x(at):.1f}" y="{y + 12:.1f}" opacity=".6" text-anchor="middle">{at}</text>'


def picture(tree: Tree, decode: Decode, paint: Paint, alone: bool = False) -> str:
    """The tree as one SVG element without scripts; `alone` makes it a file of its own that knows dark and light. Every text is escaped."""
    canvas = Canvas(tree, decode, paint)
    title = (
        f"<title>{clean(tree.task.text, 200)}: {len(tree.leaves())} paths, colour by {clean(canvas.paint.name)}</title>"
    )
    size = f'viewBox="0 0 {_WIDTH} {canvas.height:.0f}" width="{_WIDTH}" height="{canvas.height:.0f}" role="img"'
    style = 'style="max-width:100%;height:auto" fill="currentColor" font-family="ui-monospace,Menlo,Consolas,monospace" font-size="10"'
    inside = title + (THEME if alone else "") + "".join(canvas.elements())
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{inside}</svg>'


def legend(paint: Paint) -> str:
    """The scale of a paint as HTML."""
    colours = ",".join(paint.scale(paint.scale.low + i / 4 * (paint.scale.high - paint.scale.low)) for i in range(5))
    bar = (
        f'<span style="display:inline-block;width:90px;height:8px;background:linear-gradient(90deg,{colours})"></span>'
    )
    return f"{clean(paint.name)}: {paint.scale.low:.3g} {bar} {paint.scale.high:.3g}"
