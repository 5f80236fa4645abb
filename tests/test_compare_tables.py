"""What a comparison is written as: tables, CSV, LaTeX, JSON, pictures, the command."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from compared_runs import shown, sweep, two_labels
from ramulus.cli import main
from ramulus.look.compare.compare import compare
from ramulus.look.compare.plots import draw_plots, look
from ramulus.look.compare.tables import csv_text, json_text, latex, latex_text, publish, tables


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return two_labels(tmp_path / "sweep")


def test_the_table(two: Path):
    said = shown(compare([two]))
    row = next(line for line in said.splitlines() if line.strip().startswith("lavish"))
    assert "0.800±0.657" in row  # 0.6 0.7 1.1: variance 0.07, half T2 * sqrt(0.07 / 3)
    assert "+0.200±0.000" in row
    assert "higher" in row
    assert "within noise" in said
    assert "the last one measured at or before it" in said
    assert len(list(tables(compare([two])))) == 5


def test_a_narrow_terminal_gets_two_tables_and_no_cut_word(two: Path):
    out = io.StringIO()
    narrow = Console(file=out, width=70, force_terminal=True, color_system=None)
    publish(compare([two]), narrow, None, None, None, None)
    said = out.getvalue()
    assert "…" not in said
    for words in ("0.800±0.657", "+0.200±0.000", "higher", "within noise"):
        assert words in said
    assert len(list(tables(compare([two]), 70))) == 10


NASTY = "50%_of $x & {y} #1 ~^\\ <b>"


def test_latex_shows_every_label(tmp_path: Path):
    text = latex_text(compare([sweep(tmp_path, {"grpo": [{4: 0.5}] * 3, NASTY: [{4: 0.25}] * 3})]))
    shown = r"50\%\_of \$x \& \{y\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{}b\textgreater{}"
    assert shown in text
    assert r"$-0.250 \pm 0.000$ & lower \\" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert line.replace(r"\&", "").count("&") == 7
    assert latex("a\nb\x1b[31m") == "a b [31m"


def test_csv_keeps_every_label(tmp_path: Path):
    labels = {"=1+1": [{4: 0.5}] * 3, 'a,"b"': [{4: 0.25}] * 3, "-x": [{4: 0.25}] * 3}
    text = csv_text(compare([sweep(tmp_path, labels)], fractions=[1.0]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["label"] for row in rows[:3]] == ["'=1+1", 'a,"b"', "'-x"]  # a spreadsheet computes neither
    assert [row["baseline"] for row in rows[:3]] == ["'=1+1"] * 3
    assert len(rows) == 15
    first, second = rows[0], rows[1]
    assert (first["axis"], first["budget"], first["seeds"], first["mean"]) == ("steps", "4.0", "3", "0.5")
    assert (second["difference"], second["difference_low"], second["verdict"]) == ("-0.25", "-0.25", "lower")


def test_json_has_everything(two: Path):
    told = json.loads(json_text(compare([two])))
    assert told["values"]["steps"][-1]["lavish"] == {"0": 0.6, "1": 0.7, "2": 1.1}
    assert len(told["rows"]) == 5 * 4 * 2
    assert told["curves"][0]["costs"]["sampled"] == [20, 40]
    assert told["limits"]["sampled"] == "thrifty seed 0"


def test_a_label_cannot_command_the_terminal(tmp_path: Path):
    said = shown(compare([sweep(tmp_path, {"\x1b[31mred [bold]x": [{4: 0.5}], "b": [{4: 0.5}]})]))
    assert "\x1b" not in said
    assert "\\x1b[31mred [bold]x" in said


def test_plots(two: Path, tmp_path: Path):
    (two / "lavish").rename(two / "$a_1$ <lavish>")
    found = compare([two])
    found = replace(found, axes=found.axes[1:2])
    written = draw_plots(found, tmp_path / "plots")
    assert [path.name for path in written] == ["equal-sampled.svg", "equal-sampled.png"]
    assert ElementTree.parse(written[0]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert written[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = draw_plots(found, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_labels_look_different_without_colours():
    looks = [(look(i)["marker"], look(i)["linestyle"]) for i in range(40)]
    assert len(set(looks)) == 40


def test_the_command(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [f"--{kind}={tmp_path / 'new' / f'table.{kind}'}" for kind in ("csv", "latex", "json")]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(two), "--baseline", "lavish", "--fractions", "0.5", "1", *files])
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "minus lavish" in said
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["table.csv", "table.json", "table.latex"]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(two), "--metric", "eval/meen"])
    assert stopped.value.code == 2
    assert "Did you mean eval/mean" in capsys.readouterr().err
