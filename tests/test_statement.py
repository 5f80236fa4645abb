"""The statement of account: which runs and stages a folder holds, and what is said about damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compared_runs import run, stage, sweep
from ramulus.cli import main
from ramulus.look.cost.statement import read_statements


def test_seeds_are_runs_and_no_stages(tmp_path: Path):
    folder = sweep(tmp_path / "runs", {"b": [{}, {}], "a": [{}]}, {"b": 10, "a": 20})
    whole, label = read_statements([folder]), read_statements([folder / "b"])
    assert [told.folder.relative_to(folder).as_posix() for told in whole] == ["b/seed-0", "b/seed-1", "a/seed-0"]
    assert [told.accounts()["seed-0"]["tokens"]["sampled"] for told in (label[0], whole[2])] == [40, 80]
    assert [list(told.accounts()) for told in label] == [["seed-0"], ["seed-1"]]
    assert len(read_statements([folder, folder / "a", folder / "a" / "seed-0"])) == 3  # each once


def test_stages_in_order_of_number_and_nothing_else(tmp_path: Path):
    folder = run(tmp_path / "mine", 0, stages=3)
    for name in ("10-x", "2-x", "1-y", "backup"):
        stage(folder / name, {}, 4)
    (told,) = read_statements([folder])
    assert list(told.accounts()) == ["1-y", "2-x", "10-x", "run"]
    assert told.accounts()["run"]["tokens"]["sampled"] == 3 * 40


def test_runs_that_are_named_like_stages_are_runs(tmp_path: Path):
    for name in ("1-first", "2-second"):
        stage(run(tmp_path / name, 0), {}, 4)
    assert [told.folder.name for told in read_statements([tmp_path])] == ["1-first", "2-second"]


def test_a_run_without_a_step_is_left_out_and_named(tmp_path: Path):
    stage(run(tmp_path / "a" / "seed-0", 0), {}, 4)
    run(tmp_path / "a" / "seed-1", 1, finished=False)
    with pytest.warns(UserWarning, match=r"without a step so far: .*seed-1"):
        assert len(read_statements([tmp_path])) == 1
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        read_statements([tmp_path / "a" / "seed-1"])


@pytest.mark.parametrize(("line", "said"), [("{torn\n", "is no JSON"), ("5\n", "has no step"), ("{}\n", "has no step")])
def test_a_damaged_file_is_named(tmp_path: Path, line: str, said: str):
    stage(tmp_path, {}, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"line 3 of .*metrics\.jsonl {said}: the file is damaged"):
        read_statements([tmp_path])


def test_files_in_a_new_folder(tmp_path: Path):
    stage(tmp_path / "run", {}, 2)
    made = [tmp_path / "new" / name for name in ("json/x.json", "csv/x.csv")]
    with pytest.raises(SystemExit) as done:
        main(["ledger", str(tmp_path / "run"), "--json", str(made[0]), "--csv", str(made[1])])
    assert done.value.code == 0
    assert json.loads(made[0].read_text())["runs"][0]["accounts"]["run"]["steps"] == 2
    assert made[1].read_text().startswith("run,stage,")
