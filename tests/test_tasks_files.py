"""Problems from files: every format, verl's layout, Hugging Face datasets, mapped columns, and every input that must be refused."""

from __future__ import annotations

import csv
import json
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ramulus.run.evaluation.task_sets import ProblemOptions, TaskSets
from ramulus.tasks.columns import plain, read_answers
from ramulus.tasks.files import File
from ramulus.tasks.problem import Problem, references
from test_tasks_render import characters

VERL = Path(__file__).parents[2] / "shared" / "data" / "verl"
needs_data = pytest.mark.skipif(not VERL.is_dir(), reason="needs the benchmarks in ../shared/data/verl")
ROWS = [
    {"problem": "1+1?", "answer": "2"},
    {"problem": "2+2?", "answer": "4"},
    {"problem": "größer\n3?", "answer": "ja"},
]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A file of these rows in the format its name says."""
    file = folder / name
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_format_reads_alike(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, ROWS)
    problems = File(path)()
    assert problems == [Problem(f"a-{i}", row["problem"], row["answer"]) for i, row in enumerate(ROWS)]
    assert File(path, limit=2)() == problems[:2]
    with pytest.raises(ValueError, match=r"(line 1|line 2|row 1): no column 'question'"):
        File(path, prompt="question")()


def test_mapped_columns(tmp_path: Path) -> None:
    rows = [{"q": {"text": "x?", "parts": ["y?"]}, "a": 7, "key": 31, "a.b": "dotted", "level": 3, "sol": ["s1", "s2"]}]
    path = write(tmp_path, "m.jsonl", rows)
    source = File(path, prompt="q.text", answer="a", id="key", demonstration="sol", keep=("level", "q.parts"))
    assert source() == [Problem("31", "x?", "7", ("s1", "s2"), {"level": 3, "q.parts": ["y?"]})]
    assert File(path, prompt="q.parts.0", answer="a.b")()[0] == Problem("m-0", "y?", "dotted")
    assert File(path, prompt="q.text", answer=None)()[0].answer == ""


def test_answers_of_every_kind(tmp_path: Path) -> None:
    rows = [{"problem": "?", "answer": value} for value in ("a", 1, 2.5, True, ["b"], ["c", "d"], [1, 2])]
    problems = File(write(tmp_path, "a.jsonl", rows))()
    assert [p.answer for p in problems] == ["a", "1", "2.5", "true", "b", "c", "1"]
    assert [references(p) for p in problems[4:]] == [("b",), ("c", "d"), ("1", "2")]


def test_chats_as_prompts_and_demonstrations(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "answer": "2", "shown": [*CHAT, {"role": "assistant", "content": "it is 2"}]}]
    (problem,) = File(write(tmp_path, "c.jsonl", rows), prompt="messages", demonstration="shown")()
    assert problem == Problem("c-0", "1+1?", "2", ("it is 2",), {}, tuple(CHAT))


@pytest.mark.parametrize("name", ["v.jsonl", "v.parquet"])
def test_verl_layout(tmp_path: Path, name: str) -> None:
    row = {
        "data_source": "mine",
        "prompt": CHAT,
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 5, "split": "train"},
    }
    path = write(tmp_path, name, [row])
    expected = Problem(
        "v-0", "1+1?", "2", (), {"data_source": "mine", "extra_info": {"index": 5, "split": "train"}}, tuple(CHAT)
    )
    assert File(path)() == File(path, layout="verl")() == [expected]
    assert File(path, prompt="prompt", answer="reward_model.ground_truth", id="extra_info.index")()[0].id == "5"
    with pytest.raises(ValueError, match=r"no column 'problem': name one of .*reward_model.ground_truth"):
        File(path, layout="columns")()
    several = write(tmp_path, "s.parquet", [{**row, "reward_model": {"ground_truth": ["2", "two"], "style": "rule"}}])
    assert references(File(several)()[0]) == ("2", "two")


@needs_data
def test_the_real_verl_files() -> None:
    (first, *_) = problems = File(str(VERL / "aime24.parquet"))()
    assert len(problems) == 30
    assert first.answer == "204"
    assert first.messages is not None
    assert first.messages[0]["role"] == "user"
    with pytest.warns(UserWarning, match="left out 2 of 24898 rows whose answer is empty, first row 22740"):
        assert len(File(str(VERL / "dapo_math_train.parquet"))()) == 24_896
    assert len(File(str(VERL / "dapo_math_train.parquet"), limit=100)()) == 100


def test_hugging_face_datasets_from_disk(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert [p.text for p in File(str(tmp_path / "one"))()] == [row["problem"] for row in ROWS]
    assert len(File(str(tmp_path / "two"), split="test")()) == 1
    assert File(str(tmp_path / "two"), split="train", limit=2)()[1].id == "two-1"
    with pytest.raises(ValueError, match="several splits: choose one of train, test as split"):
        File(str(tmp_path / "two"))()
    with pytest.raises(ValueError, match="no split 'dev'"):
        File(str(tmp_path / "two"), split="dev")()


def test_a_split_or_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    import datasets

    for name, split in (("bare", None), ("train", "train")):
        datasets.Dataset.from_list(ROWS, split=split and datasets.NamedSplit(split)).save_to_disk(str(tmp_path / name))
    paths = {name: write(tmp_path, name, ROWS) for name in ("a.jsonl", "a.json", "a.csv", "a.parquet")}
    for path in paths.values():
        with pytest.raises(ValueError, match="is a file, which has no splits: leave split='test' out"):
            File(path, split="test")()
        with pytest.raises(ValueError, match="is a file, which has no configurations: leave config='main' out"):
            File(path, config="main")()
    with pytest.raises(ValueError, match=r"a\.csv' is a file, which has no splits"):
        File(f"{tmp_path / 'train'},{paths['a.csv']}", split="train")()
    for name, why in (("bare", "was saved as one dataset, which has no splits"), ("train", "was saved as the split 'train' alone")):
        with pytest.raises(ValueError, match=f"{why}: leave split='validation' out"):
            File(str(tmp_path / name), split="validation")()
        with pytest.raises(ValueError, match=r"was saved with the configuration .*: leave config='main' out"):
            File(str(tmp_path / name), config="main")()
    assert len(File(str(tmp_path / "train"), split="train")()) == len(ROWS)


def test_a_split_on_the_command_line_is_for_the_sets_that_have_some(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    asked = TaskSets((str(tmp_path / "two"), write(tmp_path, "a.jsonl", ROWS)), None, ProblemOptions(split="test"))
    with pytest.warns(UserWarning, match=r"--split test says nothing of .*a\.jsonl: it is a file, which has no splits") as warned:
        assert [len(tasks) for _, tasks, _ in asked.read(characters())] == [1, len(ROWS)]
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="says nothing of"):
        assert len(TaskSets((f"{tmp_path}/*.jsonl",), None, ProblemOptions(split="test")).read(characters())[0][1]) == len(ROWS)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    for name, text in (("a.csv", "problem,answer,answer\nx,1,2\n"), ("a.tsv", "problem\tanswer\tproblem\nx\t1\ty\n")):
        (tmp_path / name).write_text(text)
    pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, names=["problem", "answer", "answer"]), tmp_path / "a.parquet")
    for name, twice in (("a.csv", "answer"), ("a.tsv", "problem"), ("a.parquet", "answer")):
        with pytest.raises(ValueError, match=f"{name} has several columns named '{twice}', of which only the last would be read"):
            File(str(tmp_path / name))()
    (tmp_path / "b.csv").write_text("problem,answer,,\nx,1,,\n")
    assert len(File(str(tmp_path / "b.csv"))()) == 1


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "train.jsonl", ROWS)
    assert [p.answer for p in File(str(tmp_path / "folder"))()] == ["2", "4", "ja"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the folder .*empty.* could not be loaded"):
        File(str(tmp_path / "empty"))()


def bad(tmp_path: Path, name: str, content: str | bytes) -> str:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n\n{oops\n', "a.jsonl, line 3 is not JSON .*: '{oops"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n[1]\n', "line 2 is a list, an object with named fields"),
        ("a.jsonl", b'{"problem": "\xff\xfe"}', "not UTF-8"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", '{"problem": "x", "answer": " "}', "has no rows with an answer"),
        ("a.json", "[{]", "line 1 is not JSON"),
        ("a.jsonl", '{"problem": "x", "answer": "1", "answer": "2"}', "a.jsonl, line 1: an object has several fields named 'answer'"),
        ("a.json", '[{"problem": "x", "answer": "1", "more": {"a": 1, "a": 2}}]', "a.json: an object has several fields named 'a'"),
        ("a.json", '{"problem": 1}', "holds a JSON dict, a list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "problem,answer\nx,1\ny\n", "line 3 has more or fewer fields than the 2 of the header"),
        ("a.csv", "problem,answer\nx,1,2\n", "line 2 has more or fewer fields"),
        ("a.csv", 'problem,answer\n"x,1\n', "line 2 is not CSV"),
        ("a.csv", "problem,answer\n", "has no rows"),
        ("a.parquet", "no parquet", "not a readable parquet file"),
        ("a.txt", "x", "is no .jsonl, .json, .csv, .tsv, .parquet file"),
        (
            "a.jsonl",
            '{"problem": "x", "answer": "1"}\n{"problem": " ", "answer": "1"}',
            "line 2: column 'problem' is an empty prompt",
        ),
        ("a.jsonl", '{"problem": null, "answer": "1"}', "line 1: column 'problem' is an empty prompt"),
        ("a.jsonl", '{"problem": 5, "answer": "1"}', "holds a int, a prompt is text or a list"),
        ("a.jsonl", '{"problem": "x", "answer": null}', "has no rows with an answer"),
        ("a.jsonl", '{"problem": "x", "answer": []}', "has no rows with an answer"),
        ("a.jsonl", '{"problem": "x", "answer": [["1"]]}', "an answer is text, a number or a list"),
        ("a.jsonl", '{"problem": "x", "answer": {"a": 1}}', "an answer is text, a number or a list"),
        (
            "a.jsonl",
            '{"question": "x", "answer": {"a": 1}}',
            "line 1: no column 'problem': name one of question, answer.a",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        File(bad(tmp_path, name, content))()


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*absent.jsonl' .*check the path"):
        File(str(tmp_path / "absent.jsonl"))()
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'problems\.parquet'"):
        File("problems.parquet")()
    path = write(tmp_path, "a.jsonl", [{**ROWS[0], "sol": ""}])
    with pytest.raises(ValueError, match="column 'sol' holds '', a demonstration is"):
        File(path, demonstration="sol")()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        File(path, limit=0)()
    with pytest.raises(ValueError, match="got 'vrl'"):
        File(path, layout="vrl")  # type: ignore[arg-type]


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = bad(tmp_path, "a.jsonl", '{"problem": "x", "answer": "1"}\n{oops')
    assert len(File(path, limit=1)()) == 1


def test_rows_with_an_empty_answer_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [*ROWS, {"problem": "z", "answer": ""}])
    with pytest.warns(UserWarning, match="left out 1 of 4 rows whose answer is empty, first line 4"):
        assert len(File(path)()) == 3


def test_kinds_of_answers() -> None:
    def read(value: object) -> tuple[str, ...]:
        return read_answers(value, "row 1", "answer")

    assert [read(value) for value in (None, "", " ", float("nan"), [], [None, ""], Decimal("nan"))] == [()] * 7
    assert read([None, "5", 6, 7.5, True, b"8", Decimal("9.10"), Fraction(1, 2)]) == ("5", "6", "7.5", "true", "8", "9.10", "1/2")
    assert read("nan") == ("nan",), "text is text"
    for value in ({"a": 1}, [["1"]], b"\xff"):
        with pytest.raises(ValueError, match=r"row 1: column 'answer' holds .*an answer is text, a number or a list"):
            read(value)


def test_what_is_kept_with_a_task_becomes_plain_json() -> None:
    value = {"b": b"abc", "raw": b"\xff", "day": date(2026, 1, 2), "n": float("nan"), "d": Decimal("1.5"), "s": {2, 1}, "t": (1, 2)}
    known = {"b": "abc", "raw": {"base64": "/w=="}, "day": "2026-01-02", "n": None, "d": "1.5", "s": [1, 2], "t": [1, 2]}
    assert plain(value, "row 1", "extra_info") == known
    with pytest.raises(ValueError, match=r"holds a object, only plain JSON.*leave that column out"):
        plain(object(), "row 1", "extra_info")


def test_bytes_and_nan_in_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "prompt": [[{"role": "user", "content": f"{n}?"}] for n in range(3)],
        "reward_model": [{"ground_truth": answer} for answer in ("1", None, "3")],
        "extra_info": [{"image": b"\x89PNG", "index": n} for n in range(3)],
        "data_source": ["s"] * 3,
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="left out 1 of 3 rows whose answer is empty"):
        problems = File(str(tmp_path / "a.parquet"))()
    assert [problem.answer for problem in problems] == ["1", "3"]
    assert problems[0].extra["extra_info"]["image"] == {"base64": "iVBORw=="}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "problem;answer\n1,5 + 1,5?;3\n"),
        ("a.csv", 'problem\tanswer\n"1,5 + 1,5?"\t3\n'),
        ("a.tsv", "problem\tanswer\n1,5 + 1,5?\t3\n"),
        ("a.tsv", "problem\tanswer\tsource, page\n1,5 + 1,5?\t3\tx\n"),
        ("a.csv", '"source\n(page)";problem;answer\nx;1,5 + 1,5?;3\n'),
        ("a.csv", "problem|answer\n1,5 + 1,5?|3\n"),
        ("a.csv", '"problem",answer\n"1,5 + 1,5?",3\n'),
        ("a.csv", '\ufeff"problem";"answer"\n"1,5 + 1,5?";3\n'),
    ],
)
def test_the_header_of_a_csv_file_says_what_parts_its_columns(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text, encoding="utf-8")
    (problem,) = File(str(tmp_path / name))()
    assert (problem.text, problem.answer) == ("1,5 + 1,5?", "3")


def test_a_long_text_is_a_field_of_a_csv_file(tmp_path: Path):
    long = "a" * 200_000
    (tmp_path / "a.csv").write_text(f"problem,answer\n{long},3\n")
    (problem,) = File(str(tmp_path / "a.csv"))()
    assert problem.text == long


def test_several_files(tmp_path: Path):
    paths = [write(tmp_path, name, ROWS[:2]) for name in ("a.jsonl", "b.csv", "c.parquet")]
    (tmp_path / "more").mkdir()
    twin = write(tmp_path / "more", "a.jsonl", ROWS[2:])
    assert [p.id for p in File(", ".join(paths))()] == ["a-0", "a-1", "b-0", "b-1", "c-0", "c-1"]
    assert [p.id for p in File(f"{paths[0]},{twin}")()] == [f"{paths[0]}-0", f"{paths[0]}-1", f"{twin}-0"]
    assert [p.id for p in File(f"{tmp_path}/?.*", limit=3)()] == ["a-0", "a-1", "b-0"]
    assert len(File(f"{tmp_path}/**/*.jsonl")()) == 3
    odd = tmp_path / "one,two.jsonl"
    odd.write_text(Path(paths[0]).read_text())
    assert [p.id for p in File(str(odd))()] == ["one,two-0", "one,two-1"]
    with pytest.raises(FileNotFoundError, match=r"no file fits .*nothing\*"):
        File(f"{paths[0]},{tmp_path}/nothing*")()
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        File(f"{paths[0]},{tmp_path}/gone.jsonl")()
    (tmp_path / "b.csv").write_text("problem,solution\nx,y\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 2: no column 'answer'"):
        File(",".join(paths))()
