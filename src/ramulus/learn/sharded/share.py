"""The rows of a step shared over ranks: cut between trees, balanced by unique tokens, and what comes back put where it belongs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ramulus.learn.batch.score_row import ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch

_Row = TypeVar("_Row", TreeBatch, ScoreRow)
PLACES = ("parent", "end")  # [T] columns that name places on the row


@dataclass(frozen=True)
class Piece:
    """A tree, or what a row holds of it: the tokens [start, stop) of one of the rows."""

    row: int
    start: int
    stop: int
    key: Hashable  # pieces of one key go to one rank

    def __len__(self) -> int:
        return self.stop - self.start


def pieces(rows: Sequence[TreeBatch | ScoreRow], together: bool = False) -> list[Piece]:
    """Every tree of every row; with `together` all that several rows hold of a tree has one key."""
    parts = []
    for number, row in enumerate(rows):
        roots = np.flatnonzero(row.parent.numpy() == np.arange(len(row))).tolist()
        trees = {start: tree for tree, _, start, stop in reversed(row.spans) if stop > start}
        for start, stop in zip(roots, [*roots[1:], len(row)], strict=True):
            parts.append(Piece(number, start, stop, trees.get(start, (number, start)) if together else (number, start)))
    return parts


def share_out(parts: Sequence[Piece], ranks: int, budget: int) -> list[list[list[Piece]]]:
    """Each rank's rows, of as many pieces as fit in `budget` tokens: the largest piece first, to the rank with the fewest tokens.

    All ranks get equally many rows, some of them empty at the end, the longest first: ranks go through their rows in step.
    """
    groups: dict[Hashable, list[Piece]] = {}
    for part in parts:
        groups.setdefault(part.key, []).append(part)
    loads, rows = [0] * ranks, [[] for _ in range(ranks)]  # type: list[int], list[list[list[Piece]]]
    for group in sorted(groups.values(), key=lambda group: -sum(map(len, group))):
        rank = loads.index(min(loads))
        loads[rank] += sum(map(len, group))
        for part in group:
            row = next((row for row in rows[rank] if sum(map(len, row)) + len(part) <= budget), None)
            rows[rank].append([part]) if row is None else row.append(part)
    most = max(map(len, rows))
    return [sorted(mine, key=lambda row: -sum(map(len, row))) + [[] for _ in range(most - len(mine))] for mine in rows]


def assembled(rows: Sequence[_Row], parts: Sequence[Piece]) -> _Row:
    """Pieces of some rows as one row."""
    cut = [part_of(rows[part.row], part.start, part.stop) for part in parts]
    first, columns, at, serial = cut[0], {}, 0, 0  # type: _Row, dict[str, Any], int, int
    spans, shifted = [], []
    for row in cut:
        shifted.append(moved(row, at, serial))
        spans += shifted[-1].spans
        at += len(row)
        serial += int(row.node.max()) + 1 if isinstance(row, TreeBatch) else 0
    for field in fields(first):
        values = [getattr(row, field.name) for row in shifted]
        if isinstance(values[0], Tensor):
            columns[field.name] = torch.cat(values, -1)
    return replace(first, spans=spans, **columns)


def part_of(row: _Row, start: int, stop: int) -> _Row:
    """The tokens [start, stop) of a row, which are whole trees, as a row."""
    leaf = (row.leaf_token >= start) & (row.leaf_token < stop)
    columns: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Tensor):
            columns[field.name] = value[..., leaf] if field.name.startswith("leaf_") else value[..., start:stop]
    spans = [span for span in row.spans if start <= span[2] < span[3] <= stop]
    return moved(replace(row, spans=spans, **columns), -start, 0)


def moved(row: _Row, by: int, serial: int) -> _Row:
    """A row whose tokens stand `by` places further on; its nodes are numbered from `serial` on."""
    columns: dict[str, Any] = {name: getattr(row, name) + by for name in (*PLACES, "leaf_token")}
    if isinstance(row, TreeBatch):
        columns["node"] = row.node + serial
    return replace(row, spans=[(tree, node, start + by, stop + by) for tree, node, start, stop in row.spans], **columns)


def put_back(columns: Sequence[Tensor], parts: Sequence[Piece], row: Tensor) -> None:
    """Copy what a row [T] of pieces got into the column [T] of each of the rows that they are of."""
    at = 0
    for part in parts:
        columns[part.row][part.start : part.stop] = row[at : at + len(part)]
        at += len(part)
