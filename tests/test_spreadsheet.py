"""No CSV that ramulus writes holds a cell that a spreadsheet computes, whatever problems, labels and folders are called."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from ramulus.look.cost.statement import Statement, write_csv
from ramulus.look.evaluation.measures import Scores
from ramulus.look.evaluation.scoreboard import problems_csv, results_csv
from ramulus.look.spreadsheet import csv_of

EVIL = ['=HYPERLINK("http://a","b")', "+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠1"]


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_text_that_begins_a_formula_gets_an_apostrophe_and_everything_else_stays() -> None:
    plain = ["", "a\rb", "a=b", "1-2", " =1", "'=1", 'a,"b"', "é"]
    assert cells(csv_of([EVIL, [*plain, -1, -0.5, None, True]])) == [["'" + text for text in EVIL], [*plain, "-1", "-0.5", "", "True"]]


@pytest.mark.parametrize("name", EVIL)
def test_an_evaluation_and_a_statement_hold_no_formula(name: str, tmp_path: Path) -> None:
    scores = Scores([name], {"independent": {name: [1.0]}})
    gaps = {name: {name: {name: {"difference": -0.5, "interval": (-1.0, 0.0), "within_noise": True}}}}
    write_csv(tmp_path / "a.csv", [Statement(Path(name), {name: [{"step": 1, "seconds": {name: 1.0}}]}, 0.0)], steps=True)
    texts = [problems_csv([name], [scores]), results_csv([name], [scores], gaps), (tmp_path / "a.csv").read_bytes().decode()]
    for text in texts:
        names = [cell for line in cells(text) for cell in line if name.strip() in cell]
        assert names, "the name is still there"
        assert all(cell.startswith(("'", "independent: ", "seconds/")) for cell in names), json.dumps(names)
