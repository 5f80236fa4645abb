"""`ramulus eval` as a command: folders, going on after a kill, refusals, trees, comparisons, and real problems end to end."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.core import store
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.stop import Stop
from ramulus.learn.policy.model import Pretrained
from ramulus.look.evaluation.evaluate import evaluate
from ramulus.run.config.describe import to_json
from ramulus.run.evaluation import evaluation, progress
from ramulus.run.evaluation.answers import naming
from ramulus.run.evaluation.loaded_model import LoadedModel, load_model
from ramulus.run.evaluation.own_run import source_of
from ramulus.run.evaluation.plan import SamplingPlan, plan_of, whole_numbers
from ramulus.run.evaluation.task_sets import ProblemOptions, TaskSets
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import render
from test_cli import fails, run

HERE = Path(__file__).parent
MATH = HERE.parent.parent / "shared" / "data" / "math"
ENV = os.environ | {"PYTHONPATH": str(HERE.parent / "src")}
LETTERS = "0123456789+-=?\n"

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def built(folder: Path, letters: str, seed: int = 0) -> Path:
    """A tiny random model with these letters."""
    import torch

    from ramulus.learn.policy.model import Scratch

    torch.manual_seed(seed)
    net, tokenizer = Scratch(letters, hidden=16, layers=1, heads=2, kv_heads=1, max_positions=2048)()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("model") / "tiny", LETTERS)


@pytest.mark.parametrize("recipe", ["grpo", "ramulus.train", "no_such_file.py"])
def test_the_model_of_a_run_is_loaded_as_the_run_allowed_it(recipe: str, model: Path, tmp_path: Path) -> None:
    """Named as the run, or as a checkpoint's model, though its recipe was an object of Python or cannot be read any more."""
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    shutil.copytree(model, checkpoint / "model")
    (checkpoint / "state.json").write_text("{}")
    allowed = to_json(Pretrained(str(model), trust_remote_code=True, extra_weights=True, padded_tokens=True))
    stages = [{"name": "rl", "model": allowed, "out": str(tmp_path / "run")}]
    (tmp_path / "run/run.json").write_text(json.dumps({"format": 3, "recipe": recipe, "overrides": [], "stages": stages}))
    for name in (tmp_path / "run", checkpoint / "model"):
        source = source_of(str(name))
        assert source == Pretrained(str(checkpoint / "model"), extra_weights=True, trust_remote_code=True, padded_tokens=True)
    assert source_of(str(model)) == Pretrained(str(model))


WORDS = (
    "--tasks",
    "chain",
    "--limit",
    7,
    "--samples",
    4,
    "--k",
    "1,2",
    "--max-tokens",
    12,
    "--chunk",
    2,
    "--threads",
    1,
)
TREES = ("--tree", "--segment", 4)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted evaluation with trees."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run("eval", model, *WORDS, *TREES, "--out", out) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that came of an evaluation."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# the folder


def test_a_folder_holds_trees_tables_and_settings(whole: Path):
    made = contents(whole)
    trees = {"chain.jsonl", "chain-tree.jsonl", "chain-greedy.jsonl"}
    assert made.keys() == trees | {"eval.json", "results.json", "results.csv", "problems.csv", "results.txt"}
    for name, leaves in (("chain", 4), ("chain-tree", 4), ("chain-greedy", 1)):
        forest = list(store.read(whole / f"{name}.jsonl", strict=True))
        assert [len(tree.leaves()) for tree in forest] == [leaves] * 7
        assert all(leaf.verdict for tree in forest for leaf in tree.leaves())
    found = json.loads(made["results.json"])
    chain = found["tasks"]["chain"]
    assert {
        "mean@4",
        "pass@1",
        "pass@2",
        "maj@2",
        "ties@4",
        "greedy",
        "length",
        "truncated",
        "unanswered",
    } <= chain.keys()
    assert {"pass@4", "tokens"} <= chain["tree"].keys()
    assert {"attempts", "short", "mean", "pass", "maj"} <= chain["equal_tokens"].keys()
    assert found["tree_gains"].keys() == {"at equal answers", "at equal tokens"}
    sheet = list(csv.DictReader((whole / "results.csv").open()))
    told = {(line["sampling"], line["measure"]): line for line in sheet}
    assert float(told["independent", "length"]["value"]) == chain["length"]
    assert len(list(csv.DictReader((whole / "problems.csv").open()))) == 7
    assert "mean@4 (avg@4)" in (whole / "results.txt").read_text()


def test_tokens_of_trees_are_counted_once(whole: Path):
    trees = list(store.read(whole / "chain-tree.jsonl"))
    found = json.loads((whole / "results.json").read_text())["tasks"]["chain"]
    sampled = [sum(len(node.tokens) for node in tree.walk() if node.parent is not None) for tree in trees]
    assert found["tree"]["tokens"] == pytest.approx(sum(sampled) / 7)
    assert found["tree"]["tokens"] < 4 * found["tree"]["length"]
    stars = list(store.read(whole / "chain.jsonl"))
    assert [tree.leaves()[0].response()[:4] for tree in stars] != [tree.leaves()[0].response()[:4] for tree in trees]


def test_the_viewer_finds_the_trees_and_their_tokenizer(whole: Path):
    from ramulus.look.viewer.runs import Shelf

    shown = Shelf([whole]).refresh()
    assert sorted(one.path.name for one in shown) == ["chain-greedy.jsonl", "chain-tree.jsonl", "chain.jsonl"]
    assert all(one.tokenizer() == whole / "tokenizer" / "tokenizer.json" for one in shown)
    assert [len(one.trees(step)[1]) for one in shown for step in one.tree_steps()] == [7, 7, 7]


def test_the_same_again_samples_nothing(whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(whole)
    assert run("eval", model, *WORDS, *TREES, "--out", whole) == 0
    assert "going on after 7 of 7 problems" in capsys.readouterr().out
    assert contents(whole) == before
    single = tmp_path / "single.json"
    assert run("eval", model, *WORDS, *TREES, "--out", single) == 0
    alone, folder = json.loads(single.read_text()), json.loads(before["results.json"])
    assert [len(row["tree"]) for row in alone["tasks"]["chain"].pop("answers")] == [4] * 7
    assert alone == folder


def test_other_k_of_the_same_answers(whole: Path, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    words = [word if word != "1,2" else "3" for word in WORDS]
    assert run("eval", model, *words, *TREES, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["chain"]
    assert "pass@3" in found
    assert "pass@2" not in found
    assert (out / "chain.jsonl").read_bytes() == (whole / "chain.jsonl").read_bytes()


# going on after a kill


@pytest.mark.parametrize(
    "cut", ["middle of a line", "middle of a chunk", "one file behind", "everything but the settings"]
)
def test_a_cut_folder_ends_as_a_whole_one(whole: Path, model: Path, tmp_path: Path, cut: str):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("results.json", "results.csv", "problems.csv", "results.txt"):
        (out / name).unlink()
    lines = (out / "chain.jsonl").read_bytes().splitlines(keepends=True)
    if cut == "middle of a line":
        (out / "chain.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:100])
    elif cut == "middle of a chunk":
        (out / "chain.jsonl").write_bytes(b"".join(lines[:3]))
    elif cut == "one file behind":
        (out / "chain-greedy.jsonl").unlink()
    else:
        for path in out.glob("*.jsonl"):
            path.unlink()
    assert run("eval", model, *WORDS, *TREES, "--out", out) == 0
    assert contents(out) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), [("sampling", 20), ("between_files", 5), ("half_a_tree", 5)])
def test_a_killed_process_goes_on_bit_for_bit(whole: Path, model: Path, tmp_path: Path, moment: str, number: int):
    out = tmp_path / "out"
    words = [str(word) for word in (model, *WORDS, *TREES, "--out", out)]
    killed = subprocess.run(
        [sys.executable, HERE / "run_eval_killed.py", moment, str(number), *words],
        env=ENV,
        capture_output=True,
        timeout=200,
    )
    assert killed.returncode == -9, killed.stderr
    made = contents(out)
    assert "results.json" not in made
    assert 0 < made["chain.jsonl"].count(b"\n") < 7
    assert run("eval", *words) == 0
    assert contents(out) == contents(whole)


# refusals


def test_a_changed_setting_is_refused(whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(whole)
    said = fails(capsys, "eval", model, *WORDS, *TREES, "--temperature", 0.5, "--seed", 3, "--out", whole)
    assert "temperature was 1.0, is now 0.5" in said
    assert "seed was 0, is now 3" in said
    assert "choose another --out" in said
    words = [word if word != 7 else 6 for word in WORDS]
    assert "the problems of chain are others" in fails(capsys, "eval", model, *words, *TREES, "--out", whole)
    other = built(tmp_path / "other", LETTERS, seed=1)
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 0.01 * torch.ones_like(tensor) for name, tensor in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    assert "weights was" in fails(capsys, "eval", other, *WORDS, *TREES, "--out", whole)
    assert contents(whole) == before


def test_folders_that_are_something_else(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is no evaluation" in fails(capsys, "eval", model, *WORDS, "--out", tmp_path)
    (tmp_path / "eval.json").write_text("{}")
    assert "no saved evaluation" in fails(capsys, "eval", model, *WORDS, "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_asked_for(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "got 'x'" in fails(capsys, "eval", model, "--tasks", "chain", "--k", "1,x")
    assert "pass@8" in fails(capsys, "eval", model, "--tasks", "chain", "--samples", 4, "--k", "1,8")
    assert "--samples of at least 8" in fails(capsys, "eval", model, "--tasks", "chain", "--tree", "--width", 8)
    assert "leave out --k" in fails(capsys, "eval", model, "--tasks", "chain", "--tree", "--no-independent", "--k", 2)
    assert "--chunk" in fails(capsys, "eval", model, "--tasks", "chain", "--chunk", 0)
    assert "nothing was asked for" in fails(capsys, "eval", model, "--tasks", "chain", "--samples", 0, "--no-greedy")
    tree = ("eval", model, "--tasks", "chain", "--tree")
    assert "--segment" in fails(capsys, *tree, "--segment", 0)
    assert "at least 1, got 64 and 0" in fails(capsys, *tree, "--branching", 0)
    assert "--width of at least 1" in fails(capsys, *tree, "--width", 0)
    assert "top_p" in fails(capsys, "eval", model, "--tasks", "chain", "--top-p", 2)
    assert whole_numbers(("1,8,32",)) == whole_numbers(("1", "8", "32")) == whole_numbers(("1,", "8,32")) == (1, 8, 32)
    assert plan_of(4, 1.0, 1.0, True, (4, 8, 8), None, 0, None).kinds(20)["tree"][0].branching == 4  # type: ignore[attr-defined]
    assert SamplingPlan(0, width=2, greedy=False).answers == 2


def test_names_of_sets():
    specs = ["a/aime24.jsonl", "b/aime24.jsonl", "gym:chain_sum", "chain", "a/tasks.jsonl", "a/tasks-tree.jsonl"]
    with pytest.raises(ValueError, match="chain twice"):
        naming(["chain", "chain"])
    assert list(naming(specs).values()) == ["aime24", "aime24-2", "gym-chain_sum", "chain", "tasks", "tasks-tree-2"]


# what is said meanwhile


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_plain_lines_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
):
    monkeypatch.setattr(progress, "SPOKEN", -1.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    asked = TaskSets(("chain",), 7, ProblemOptions(prompt_limit=64))
    opener = partial(load_model, device="cpu", threads=1, slots=8)
    evaluation.run_evaluation(str(model), opener, asked, SamplingPlan(2, max_tokens=8, chunk=2), (), None, tmp_path, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    if terminal:
        assert "7/7" in said
        assert "tok/s" in said
        assert "0:00:00" in said, "the time left"
    else:
        assert [line.split("  ")[0] for line in said.splitlines()[:4]] == [
            f"chain {n}/7 problems" for n in (2, 4, 6, 7)
        ]
        assert "left 0:0" in said
        assert "\x1b" not in said


# comparisons


def test_against_an_earlier_evaluation(whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    single = tmp_path / "earlier.json"
    assert run("eval", model, *WORDS, "--out", single) == 0
    content = json.loads(single.read_text())
    for row in content["tasks"]["chain"]["answers"]:
        row["greedy"][0]["correct"] = 1.0
    single.write_text(json.dumps(content))
    out = tmp_path / "out"
    capsys.readouterr()
    assert run("eval", model, *WORDS, "--out", out, "--against", single) == 0
    said = capsys.readouterr().out
    assert "within noise" in said
    found = json.loads((out / "results.json").read_text())["against"]["tasks"]["chain"]
    assert found["independent"]["mean"]["difference"] == 0.0
    assert found["independent"]["mean"]["within_noise"]
    assert found["greedy"]["greedy"]["difference"] == -1.0
    assert not found["greedy"]["greedy"]["within_noise"]
    assert run("eval", model, *WORDS, *TREES, "--against", whole, "--out", tmp_path / "more") == 0
    found = json.loads((tmp_path / "more" / "results.json").read_text())["against"]["tasks"]["chain"]
    assert {"independent", "tree", "greedy"} == found.keys()
    assert found["tree"]["length"]["difference"] == 0.0
    (tmp_path / "bad.json").write_text("[]")
    for nothing in (tmp_path / "nosuch.json", tmp_path / "nosuch"):
        said = fails(capsys, "eval", model, *WORDS, "--against", nothing, "--out", tmp_path / "unused")
        assert "neither a model nor an evaluation" in said
    assert not (tmp_path / "unused").exists()
    assert "no evaluation with answers" in fails(capsys, "eval", model, *WORDS, "--against", tmp_path / "bad.json")


def never(model: str) -> LoadedModel:
    raise AssertionError(f"{model} was opened before the question was found wrong")


def test_a_comparison_or_a_place_that_cannot_be_is_refused_before_the_model_is_opened(whole: Path, tmp_path: Path):
    asked = TaskSets(("gym:chain_sum",), 7)
    console = Console(file=io.StringIO())
    with pytest.raises(ValueError, match="it has chain, here is gym-chain_sum"):
        evaluation.run_evaluation("m", never, asked, SamplingPlan(2), (), str(whole), tmp_path / "out", console)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for out in (tmp_path / "file" / "x.json", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=r"cannot write in the folder .*file.* choose another --out"):
            evaluation.run_evaluation("m", never, asked, SamplingPlan(2), (), None, out, console)
    with pytest.raises(ValueError, match="is a folder, and a name"):
        evaluation.run_evaluation("m", never, asked, SamplingPlan(2), (), None, tmp_path / "folder.json", console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


@pytest.mark.parametrize("name", ["out", "out.json"])
def test_the_results_outlive_a_comparison_that_fails(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    saved = json.loads((whole / "results.json").read_text())
    rows = [{"id": "elsewhere", "problem": "1+1=", "answer": "2", "greedy": [], "sampled": []}]
    saved["tasks"] = {"chain": saved["tasks"]["chain"] | {"answers": rows}}
    (tmp_path / "earlier.json").write_text(json.dumps(saved))
    words = ("eval", model, *WORDS, "--against", tmp_path / "earlier.json", "--out", tmp_path / name)
    assert run(*words) == 2
    said = capsys.readouterr()
    assert "no problem is in both" in said.err
    assert "mean@4" in said.out
    assert "every answer is in" in said.out
    made = tmp_path / name
    found = json.loads((made if made.is_file() else made / "results.json").read_text())
    assert "mean@4" in found["tasks"]["chain"]
    assert "against" not in found


def test_against_another_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other, out = built(tmp_path / "other", LETTERS + "x"), tmp_path / "out"
    words = ("eval", model, *WORDS, "--out", out, "--against", other)
    assert run(*words) == 0
    assert len(list(store.read(out / "against" / "chain.jsonl"))) == 7
    before = contents(out)
    assert run(*words) == 0, "both go on"
    assert contents(out) == before
    assert "chain: this model and" in capsys.readouterr().out


# real problems


needs_data = pytest.mark.skipif(not MATH.is_dir(), reason="needs the benchmarks in ../shared/data")


@needs_data
def test_sets_of_real_problems_from_file_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import string

    tiny, out = built(tmp_path / "model", string.printable), tmp_path / "out"
    words = (
        "--tasks",
        MATH / "aime24.jsonl",
        MATH / "amc23.jsonl",
        "--limit",
        6,
        "--samples",
        3,
        "--k",
        "1",
        "3",
        "--max-tokens",
        16,
    )
    assert run("eval", tiny, *words, *TREES, "--threads", 1, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["tasks"].keys() == {str(MATH / "aime24.jsonl"), str(MATH / "amc23.jsonl")}
    assert found["mean"]["independent"]["mean@3"] == 0.0
    assert found["mean"]["independent"]["unanswered"] == 1.0
    assert "mean over sets" in capsys.readouterr().out
    assert [tree.task.id for tree in store.read(out / "aime24.jsonl")][:2] == ["aime24-0", "aime24-1"]
    more = [*words[:3], MATH / "aime25.jsonl", *words[3:]]
    assert run("eval", tiny, *more, *TREES, "--threads", 1, "--out", out) == 0, "one more set joins the others"
    assert "going on after 12 of 18 problems" in capsys.readouterr().out


class Sayings:
    """A tokenizer whose tokens are whole answers; it reads every prompt as one token."""

    eos_token_id, chat_template, eos_token = 0, None, ""
    texts = ("", "\\boxed{204}", "\\boxed{113}", "so it is 204", "\\boxed{ 204.0 }")

    def __call__(self, texts: list[str], **_: object) -> Sayings:
        self.input_ids = [[1] for _ in texts]
        return self

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.texts[token] for token in tokens)


@needs_data
def test_real_problems_graded_by_a_model_that_knows_one_answer():
    """The first answer of AIME 24 is 204, the second 113: what is known of the sampler is found in the numbers."""
    import math

    tasks = render(File(str(MATH / "aime24.jsonl"), limit=2)(), Sayings())
    shares = [0.0, 0.3, 0.3, 0.2, 0.2]
    engine = ToyEngine(vocab=5, table={(): [math.log(p) if p else -1e9 for p in shares]})
    stop, rewards = Stop(eos=(0,), max_tokens=1), [(Boxed(), 1.0, "right")]
    found = asyncio.run(evaluate(engine, tasks, rewards, Sayings().decode, stop, Sampling(1), 200, False, k=[1, 9]))
    first, second = found["answers"]
    assert first["answer"] == "\\boxed{204}"
    assert second["answer"] == "\\boxed{113}"
    right = [sum(attempt["correct"] for attempt in row["sampled"]) / 200 for row in (first, second)]
    assert right == pytest.approx([0.5, 0.3], abs=0.12)
    assert found["mean@200"] == found["pass@1"] == pytest.approx(sum(right) / 2)
    assert found["unanswered"] == pytest.approx(0.2, abs=0.1)
    assert found["maj@9"] == pytest.approx(0.5, abs=0.15), "204 and 204.0 vote together and win; 113 loses to them"
