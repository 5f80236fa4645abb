"""The one progress bar: of a run, an evaluation, a sweep, a copy; it shows on a terminal and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_COUNTS: dict[str, tuple[type[ProgressColumn], ...]] = {"bytes": (DownloadColumn,), "": ()}
"""What counts the units of a bar, where it is not N of M; a bar without a unit shows no count."""


class Bar(Progress):
    """Title, bar, how many units are done, a note, the time left where nobody else tells it; below it the last of some lines."""

    def __init__(
        self, console: Console, title: str, total: int, unit: str, done: float = 0, left: bool = True, transient: bool = True
    ) -> None:
        counts = [kind() for kind in _COUNTS[unit]] if unit in _COUNTS else [MofNCompleteColumn(), TextColumn(unit)]
        columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), *counts, TextColumn("{task.fields[note]}")]
        columns += [TimeRemainingColumn()] if left else []
        self.below: tuple[str, ...] = ()  # the first as it is, the others dim
        self.line: Callable[[], str] | None = None  # asked for a line each time that the bar is drawn
        super().__init__(*columns, console=console, transient=transient, disable=not console.is_terminal, refresh_per_second=5)
        self.bar = self.add_task(escape(title), total=total, completed=done, note="")  # type: ignore[arg-type]

    def show(self, done: float, note: str = "", below: tuple[str, ...] = ()) -> None:
        """So much is done in all; a note beside the bar, and lines below it."""
        self.below = below
        self.update(self.bar, completed=done, note=escape(note))  # type: ignore[arg-type]

    def more(self, count: float = 1) -> None:
        """So much more is done."""
        self.advance(self.bar, count)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        with suppress(Exception):  # it reads numbers that others write; a line less is no harm
            if self.line is not None and (line := self.line()):
                yield Padding(Text(line), (0, 0, 0, 2))
        for i, line in enumerate(self.below):
            yield Padding(Text(line, style="dim" if i else ""), (0, 0, 0, 2))
