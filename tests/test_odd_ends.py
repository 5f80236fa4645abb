"""What a user meets at the edges of looks, sweeps and exports: a screen that is gone, rewards that say little, odd names, steps without credit."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import signal
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramulus import Author, Task, Tree
from ramulus.cli import run as command
from ramulus.core import store
from ramulus.core.tree import correctness
from ramulus.look.curves import find_runs
from ramulus.look.evaluation.measures import report_of, scores_of
from ramulus.look.stages import loose_files, step_files
from ramulus.look.viewer.page import url
from ramulus.look.viewer.show import draw_tree
from ramulus.look.viewer.tree_json import step_row
from ramulus.run.advice import Facts, entropy_collapsing
from ramulus.run.callbacks import Callback, Listeners, StepDone
from ramulus.run.config.describe import to_json
from ramulus.run.config.weighted import named_rewards, reward_digest
from ramulus.run.evaluation.answers import settle
from ramulus.run.evaluation.evaluation import folder_against
from ramulus.run.evaluation.final_evaluation import is_better
from ramulus.run.evaluation.own_run import rewards_by_name
from ramulus.run.interrupt import Interrupt
from ramulus.run.publish import model_card
from ramulus.run.rollouts import path_metrics
from ramulus.run.sweep.job_pool import Job, JobPool, signal_name
from ramulus.run.sweep.sweep import label_of, recipes_and_labels
from ramulus.run.trackers import cell
from run_recipe import rl

SAVES = "import signal,sys,time,pathlib; signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143))); time.sleep(60)"


def graded(*verdicts: dict[str, Any] | None) -> Tree:
    """A tree of paths with these verdicts, as grading writes them; None: a path that was pruned."""
    tree = Tree.plant(Task("t", (1, 2), "1+1?", "2"))
    for verdict in verdicts:
        leaf = tree.add(tree.root, [3], Author.POLICY, logprobs=[-0.5], finish="eos" if verdict is not None else "pruned")
        if verdict is not None:
            leaf.reward, leaf.verdict = float(verdict.get("correct", verdict.get("score", 0.0))), dict(verdict)
    return tree


def rows(tree: Tree) -> list[dict[str, Any]]:
    attempts = [
        {"tokens": 1, "finish": leaf.finish, "reward": leaf.reward, "correct": leaf.verdict.get("correct"), "verdict": leaf.verdict}
        for leaf in tree.leaves()
    ]
    return [{"id": "t", "problem": "", "answer": "2", "sampled": attempts, "greedy": attempts[:1]}]


RIGHT, SILENT = {"score": 1.0, "correct": 1.0, "answer": "2"}, {"score": 0.0}  # a reward that says nothing of an answer it cannot find


@pytest.mark.parametrize("order", [(RIGHT, SILENT, RIGHT, RIGHT), (SILENT, RIGHT, RIGHT, RIGHT)])
def test_an_answer_of_which_nothing_is_said_is_wrong_where_others_are_right(order: tuple[dict[str, Any], ...]) -> None:
    tree = graded(*order)
    assert sorted(correctness(tree.leaves())) == [0.0, 1.0, 1.0, 1.0]
    report = report_of(scores_of(rows(tree), [2, 4]), rows(tree))
    assert (report["mean@4"], report["pass@4"], report["unanswered"]) == (0.75, 1.0, 0.25)
    numbers = path_metrics(tree.leaves())
    assert (numbers["pass_rate"], numbers["graded"], numbers["correct"], numbers["answered"]) == (0.75, 4, 3, 0.75)
    assert step_row(tree, 0)["pass_rate"] == 0.75


def test_where_no_reward_calls_anything_right_there_is_no_pass_rate() -> None:
    tree = graded({"score": 0.5}, {"score": 0.7}, None)
    assert correctness(tree.leaves()) == []
    assert not {"pass_rate", "graded"} & path_metrics(tree.leaves()).keys()
    assert scores_of(rows(tree), [2]).groups["independent"].keys() == {"reward", "length", "truncated"}
    assert correctness(graded(RIGHT, None).leaves()) == [1.0], "what was pruned is not graded"


def test_evaluations_of_two_kinds_are_never_compared() -> None:
    best = {"step": 3, "score": 0.5, "of": "mean"}
    assert not is_better("reward", 0.9, best)
    assert is_better("mean", 0.1, {"step": 3, "score": 0.9, "of": "reward"})
    assert is_better("mean", 0.6, {"step": 3, "score": 0.5}), "one of before they were told apart"
    assert not is_better("mean", 0.5, best)


def a_job(folder: Path, words: list[str]) -> Job:
    class Started(Job):
        command = property(lambda self: words)  # type: ignore[assignment]

    return Started("mine", 0, "none", folder, (), (), ())


def a_pool(folder: Path, jobs: list[Job], console: Console) -> JobPool:
    return JobPool(jobs, 2, dict(os.environ), open(folder / "lock", "w"), console)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("anything")])
def test_a_sweep_that_breaks_has_its_runs_save(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [a_job(tmp_path / name / "seed-0", [sys.executable, "-c", SAVES, str(tmp_path / f"{name}-saved")]) for name in ("a", "b")]
    pool = a_pool(tmp_path, jobs, Console(file=io.StringIO()))
    looks = iter(range(100))

    def breaks(stopping: bool, usual: Any = pool.collect) -> None:
        if next(looks) == 5:
            raise error
        usual(stopping)

    monkeypatch.setattr(pool, "collect", breaks)
    with Interrupt() as interrupt, pytest.raises(type(error)):
        pool.work(interrupt)
    assert (tmp_path / "a-saved").exists()
    assert (tmp_path / "b-saved").exists()


def test_a_run_that_cannot_be_started_does_not_end_the_others(tmp_path: Path) -> None:
    jobs = [a_job(tmp_path / "a" / "seed-0", [str(tmp_path / "nothing")]), a_job(tmp_path / "b" / "seed-0", [sys.executable, "-c", ""])]
    console = Console(file=io.StringIO(), width=400)
    pool = a_pool(tmp_path, jobs, console)
    with Interrupt() as interrupt:
        pool.work(interrupt)
    assert pool.done == [jobs[1]]
    assert [how.split(" (")[0] for how in pool.failed] == ["mine seed 0 could not be started"]


def test_signals_have_names_or_numbers() -> None:
    assert (signal_name(signal.SIGKILL), signal_name(35)) == ("SIGKILL", "signal 35")


@pytest.mark.parametrize(
    ("recipe", "label"), [("/home/me/mine.yaml", "mine"), ("/home/me/mine.yml", "mine"), ("日本.py", "日本"), ("été.py:grpo", "été-grpo")]
)
def test_a_label_names_no_folder_of_this_machine(recipe: str, label: str) -> None:
    assert label_of(recipe) == label


def test_a_later_sweep_of_further_recipes_keeps_the_first_label_first(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"labels": ["grpo-small"], "recipes": ["grpo:small"]}))
    assert recipes_and_labels(["dapo:small", "grpo:small"], tmp_path)["labels"] == ["grpo-small", "dapo-small"]


def test_runs_of_a_sweep_below_a_folder_of_runs_are_found(tmp_path: Path) -> None:
    for place in ("mine", "three/grpo/seed-0", "three/grpo/seed-1"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"stages": [{"seed": 0}]}')
        (folder / "metrics.jsonl").write_text("")
    assert len(find_runs([tmp_path])) == 3


def a_reward(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:score"


def test_grades_of_another_reward_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    one = a_reward(tmp_path / "a", "ra.py", "def score(task, path):\n    return 1.0\n")
    other = a_reward(tmp_path / "b", "rb.py", "def score(task, path):\n    return 0.0\n")
    digests = [reward_digest(tuple(rewards_by_name(name))) for name in (one, other, "Boxed", "ExactAnswer")]
    assert len(set(digests)) == 4
    assert reward_digest(tuple(rewards_by_name(one))) == digests[0]
    [(reward, weight, name)] = rewards_by_name("Boxed")
    alone = blake2b(json.dumps([[name, weight, to_json(reward)]]).encode(), digest_size=16).hexdigest()
    assert digests[2] == alone, "as evaluations of before wrote it"
    settings = {"rewards": ["1 x score"], "code of the rewards": digests[0]}
    settle(tmp_path / "out", "m", settings, {})
    settle(tmp_path / "out", "m", settings, {})
    with pytest.raises(ValueError, match="code of the rewards was"):
        settle(tmp_path / "out", "m", settings | {"code of the rewards": digests[1]}, {})
    settle(tmp_path / "former", "m", {"rewards": ["1 x score"]}, {})
    settle(tmp_path / "former", "m", settings, {})
    with pytest.raises(ValueError, match="two rewards have the same name"):
        rewards_by_name(f"{one},{other}")
    assert [name for _, _, name in named_rewards(rl().rewards)] == [name for _, _, name in rl().weighted()]


def test_each_model_compared_with_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert folder_against(tmp_path, "b") == tmp_path / "against"
    settle(tmp_path / "against", "b", {}, {})
    assert folder_against(tmp_path, "b") == tmp_path / "against"
    assert folder_against(tmp_path, "c") == tmp_path / "against-2"


def stepped(folder: Path, credit: bool) -> Path:
    """A run of two steps; in the second, or without `credit` in both, nothing was trained."""
    for step in (1, 2):
        tree = graded({"correct": 1.0}, {"correct": 0.0})
        tree.step = step
        for leaf in tree.leaves() if credit and step == 1 else ():
            leaf.verdict["credit/GroupMean"] = leaf.reward - 0.5
        store.write(folder / "trees" / f"{step:06d}.jsonl", [tree])
    (folder / "metrics.jsonl").write_text("")
    return folder


@pytest.mark.parametrize("kind", ["verl", "prime-rl"])
def test_a_step_in_which_nothing_was_trained_is_exported_without_credit(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("msgspec")
    pytest.importorskip("tensordict")
    folder = stepped(tmp_path / "run", True)
    assert command(["export", str(folder), str(tmp_path / "out"), "--trees", kind, "--steps", "1,1,2"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    if kind == "prime-rl":
        import msgspec

        batches = msgspec.msgpack.decode((tmp_path / "out" / "step_2" / "rank_0.bin").read_bytes())
        assert [batch[2] for batch in batches] == [[0.0] * 3] * 2
        assert [batch[1] for batch in batches] == [[False] * 3] * 2


def test_an_export_that_fails_leaves_nothing_in_its_place(tmp_path: Path) -> None:
    pytest.importorskip("msgspec")
    folder = stepped(tmp_path / "run", False)
    with pytest.raises(ValueError, match="no credit"):
        command(["export", str(folder), str(tmp_path / "out"), "--trees", "prime-rl"])
    (folder / "trees" / "000002.jsonl").write_text("no tree\n")
    with pytest.raises(ValueError, match="not JSON"):
        command(["export", str(folder), str(tmp_path / "out"), "--trees", "verl"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["export", "run", "out", "--steps", "1"], "--steps"),
        (["export", "run", "out", "--credit", "GroupMean"], "--credit"),
        (["export", "run", "out", "--trees", "verl", "--which", "best"], "--which"),
        (["eval", "m", "--tasks", "sums", "--width", "4"], "--width"),
        (["eval", "m", "--tasks", "sums", "--segment", "4"], "--segment"),
        (["eval", "m", "--tasks", "lm_eval:arc", "--against", "b"], "--against"),
        (["eval", "m", "--tasks", "lm_eval:arc", "--samples", "2", "--system", "x"], "--samples, --system"),
        (["rollout", "m", "--tasks", "sums", "--star", "--branching", "4"], "--branching"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        command(words)


@pytest.mark.parametrize("shape", ["chain", "comb", "binary"])
@pytest.mark.parametrize("depth", [20, 60])
def test_a_deep_tree_is_drawn_whole(shape: str, depth: int) -> None:
    tree = Tree.plant(Task("t", (1,), "t"))
    ends = [tree.root]
    for _ in range(depth if shape != "binary" else 6):
        grown = [tree.add(end, [2], Author.POLICY) for end in ends for _branch in range(1 + (shape != "chain"))]
        ends = grown if shape == "binary" else grown[:1]
    for leaf in tree.leaves():
        leaf.finish = f"end-{leaf.id}-"
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(draw_tree(tree, lambda tokens: "text of a segment", 50))
    assert all(f"end-{leaf.id}-" in console.file.getvalue() for leaf in tree.leaves())


@pytest.mark.parametrize("name", ["held out (1).jsonl", "l'été!.jsonl", "a*b~c.jsonl", "plain.jsonl", "a&b=c.jsonl"])
def test_addresses_are_those_that_the_page_asks_for(name: str) -> None:
    import urllib.parse

    asked = "name=" + urllib.parse.quote(name, safe="!'()*~-_.")  # what encodeURIComponent leaves as it is
    assert url("answers", name=name) == f"/api/answers?{asked}"


def test_a_set_of_problems_called_by_a_year_is_no_step(tmp_path: Path) -> None:
    store.write(tmp_path / "2024.jsonl", [graded(RIGHT)])
    assert list(step_files(tmp_path)) == [2024]
    (tmp_path / "eval.json").write_text("{}")
    assert step_files(tmp_path) == {}
    assert loose_files(tmp_path) == [tmp_path / "2024.jsonl"]


def test_one_page_holds_what_can_be_read_beside_what_cannot(tmp_path: Path) -> None:
    folder = stepped(tmp_path / "run", True)
    line = store.dump(graded(RIGHT, SILENT))
    (folder / "trees" / "000002.jsonl").write_bytes(line.replace(b"-0.5", b'"x"', 1) + line)  # a number that is none
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.warns(UserWarning, match="left out"):
        assert command(["view", str(folder), str(tmp_path / "notes.txt"), "--out", str(tmp_path / "page.html")]) == 0
    assert "text" in (tmp_path / "page.html").read_text()


class Odd(Callback):
    """One whose method has no name, or raises when it is looked up."""

    def __init__(self, raises: bool) -> None:
        self.steps: list[int] = []
        self.raises = raises

    @property
    def on_step(self) -> Any:  # type: ignore[override]
        if self.raises:
            raise LookupError("no such thing")
        return functools.partial(lambda steps, event: steps.append(event.step), self.steps)


def test_a_callback_whose_method_is_no_function_is_called_or_said(tmp_path: Path) -> None:
    said: list[str] = []
    odd, bad = Odd(False), Odd(True)
    for step in (1, 2):
        Listeners([bad, odd], said.append).tell(lambda it: it.on_step, StepDone(rl(), step, said.append, {}))
    assert odd.steps == [1, 2]
    assert "Odd raised LookupError: no such thing" in said[0]


@pytest.mark.parametrize("text", ["a\rb", "![x](http://evil/x.png)", "`b | c`", "[x](y)", "<b>", "http://evil", "a\u2028b", "*b* _c_ ~d~", "# e"])
def test_what_a_model_wrote_stays_text_in_a_table_of_tensorboard(text: str) -> None:
    markdown = pytest.importorskip("markdown")
    page = markdown.markdown(f"| a |\n| --- |\n| {cell(text)} |", extensions=["tables"])
    assert page.count("<td>") == 1
    assert not any(tag in page for tag in ("<img", "<a ", "<code", "<em", "<strong", "<b>", "<h1"))


def test_a_reward_on_a_scale_that_is_as_high_as_it_was_is_no_collapse() -> None:
    def steps(reward: float) -> list[dict[str, Any]]:
        return [{"paths": 8, "entropy": 1.0 if i < 10 else 0.01, "reward": 0.5 if i < 10 else reward, "mixed": 0.0} for i in range(40)]

    facts = Facts(rl(), 100)
    assert entropy_collapsing(steps(1.0), facts) is None
    assert entropy_collapsing(steps(0.3), facts) is not None


def test_a_card_names_no_path_of_several_parts(tmp_path: Path) -> None:
    stage = tmp_path / "runs" / "mine"
    stage.mkdir(parents=True)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    for path, named in (("models/secret-client/qwen", False), ("models/qwen", False), ("Qwen/Qwen3-0.6B", True)):
        stages = [{"name": "rl", "model": {"class": "ramulus.Pretrained", "path": path}}]
        (stage / "run.json").write_text(json.dumps({"recipe": "grpo", "stages": stages}))
        assert (f"base_model: {path}" in model_card(stage, 3, "me/mine")) is named, path


def test_where_trees_go_is_looked_at_before_they_are_grown(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    from ramulus.run.evaluation.loaded_model import grow_trees

    for out in (tmp_path, tmp_path / "there.jsonl"):
        with pytest.raises(ValueError, match="is there already"):
            grow_trees(None, None, None, 1.0, 8, 0, out, Console())  # type: ignore[arg-type]
