"""CSV whose text a spreadsheet shows and never computes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a cell begins with that a spreadsheet takes for a formula


def csv_of(lines: Iterable[Sequence[Any]]) -> str:
    """The lines as CSV, the head among them; None is an empty cell, and text that would be a formula gets an apostrophe before it."""
    rows: list[str] = []
    writer = csv.writer(SimpleNamespace(write=rows.append), lineterminator="\r\n")  # so that a cell with either of them is quoted
    writer.writerows([_shown(cell) for cell in line] for line in lines)
    return "".join(row.removesuffix("\r\n") + "\n" for row in rows)


def _shown(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
