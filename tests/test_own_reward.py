"""A run on one's own reward: means where nothing is called correct, and an evaluation by what the run was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramulus.cli import main
from ramulus.core.run_folder import newest_state
from ramulus.core.tree import Author, Tree
from ramulus.look.evaluation.evaluate import answers_of
from ramulus.look.evaluation.measures import report_of, scores_of

RECIPE = str(Path(__file__).parent / "run_recipe.py")
REWARDS = """
def length(task, path):
    return path.length / 100


def short(task, path):
    return {"reward": 1.0 if path.length < 4 else -1.0, "correct": float(path.length < 4)}


def leaves(task, path):
    raise SystemExit(3)


class Kind:
    def __call__(self, task, path):
        return 0.5


class Wants:
    def __init__(self, much):
        self.much = much


class Mute:
    pass
"""

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rewards: Path) -> Path:
    """A run of two steps on the length of answers, evaluated after each."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = [f"rewards={rewards}:length", "evals=chain", "evals.count=5", "final_evaluation=none", "eval_every=1", "steps=2", "tensorboard=false"]
    assert run("train", RECIPE, f"out={out}", *words) == 0
    return out


def test_a_reward_on_a_scale_has_a_mean_and_no_pass_rate(trained: Path):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert not {"pass_rate", "eval/mean", "eval/greedy"} & row.keys()
        assert (row["graded"], row["correct"]) == (0, 0)
        assert 0 < row["eval/reward"] < 1
        assert 0 < row["eval/greedy_reward"] < 1
    best = max(rows, key=lambda row: (row["eval/reward"], -row["step"]))
    state = newest_state(trained)
    assert state is not None
    assert state["best"] == {"step": best["step"], "score": best["eval/reward"], "of": "reward"}


def test_eval_of_a_run_asks_what_it_was_trained_with(trained: Path, rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "found.json"
    assert run("eval", trained, "--samples", 2, "--out", out) == 0
    said = capsys.readouterr().out
    assert "mean reward" in said
    assert "holds no problems out" not in said
    found = json.loads(out.read_text())
    (scores,) = found["tasks"].values()
    assert scores["problems"] == 5
    assert found["settings"]["rewards"] == ["1 x length"]
    assert found["max_tokens"] == json.loads((trained / "run.json").read_text())["stages"][0]["response_limit"]
    attempts = [attempt for row in scores["answers"] for attempt in row["sampled"]]
    assert all(attempt["reward"] == attempt["tokens"] / 100 and attempt["correct"] is None for attempt in attempts)
    assert scores["reward"] == pytest.approx(sum(attempt["reward"] for attempt in attempts) / 10)
    assert not {"mean@2", "pass@2", "greedy"} & scores.keys()


def test_any_grader_by_its_name_or_file(trained: Path, rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1+2?", "answer": "3"}\n')
    out = tmp_path / "found.json"
    assert run("eval", trained, "--tasks", problems, "--samples", 2, "--out", out) == 0  # the run's own reward on other problems
    (scores,) = json.loads(out.read_text())["tasks"].values()
    assert "pass@2" not in scores
    assert run("eval", trained, "--tasks", problems, "--samples", 2, "--reward", f"{rewards}:short", "--out", out) == 0
    (scores,) = json.loads(out.read_text())["tasks"].values()
    assert scores["reward"] == pytest.approx(2 * scores["mean@2"] - 1)
    trees = tmp_path / "trees.jsonl"
    assert run("rollout", trained, "--reward", "ChainAnswer", "--width", 2, "--out", trees) == 0
    assert set(json.loads(trees.read_text())["nodes"][-1]["verdict"]) >= {"chainanswer", "correct"}
    capsys.readouterr()
    assert run("eval", trained, "--reward", "Boxd") == 2
    assert "Did you mean Boxed?" in capsys.readouterr().err
    assert run("eval", trained, "--reward", f"{rewards}:leaves") == 2
    assert "SystemExit: 3" in capsys.readouterr().err


def test_a_class_of_ones_own_is_made_where_it_can_be(rewards: Path, capsys: pytest.CaptureFixture[str]):
    from ramulus.run.evaluation.own_run import rewards_by_name

    ((grader, _, name),) = rewards_by_name(f"{rewards}:Kind")
    assert (grader(None, None), name) == (0.5, "kind")  # type: ignore[operator, arg-type]
    for kind, said in (("Wants", "wants arguments"), ("Mute", "do not grade"), ("gone", "has no function 'gone'")):
        with pytest.raises(ValueError, match=said):
            rewards_by_name(f"{rewards}:{kind}")


def test_a_file_where_the_folder_of_a_run_should_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("x")
    for out in (tmp_path / "mine", tmp_path / "mine" / "run"):
        assert run("train", RECIPE, f"out={out}") == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'mine'} is a file; choose another with out=FOLDER" in said
        assert "free space" not in said


def test_a_run_that_holds_nothing_out_is_measured_on_what_it_learned_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evals=none", "final_evaluation=none", "eval_every=0", "steps=1", "tensorboard=false"]
    assert run("train", RECIPE, f"out={tmp_path / 'run'}", *words) == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "run", "--samples", 2, "--limit", 3) == 0
    assert "holds no problems out, so it is measured on those that it was trained on" in capsys.readouterr().out


def test_a_model_has_no_problems_of_its_own(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = next((trained / "checkpoints").glob("*/model"))
    assert run("eval", model) == 2
    assert "is no run, whose held-out problems would be taken: name --tasks" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a file, with worked problems before each one, and a stop of its own."""
    folder = tmp_path_factory.mktemp("shown")
    sums = [f"{a}+{b}?" for a in range(1, 5) for b in range(1, 5)]
    for name, part in (("train", sums[:8]), ("held", sums[8:13]), ("worked", sums[13:])):
        lines = [json.dumps({"q": text, "a": str(eval(text[:-1])), "how": f"{text[:-1]}=\n{eval(text[:-1])}"}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "recipe.py").write_text(
        f"from dataclasses import dataclass, replace\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport run_recipe\n"
        "from ramulus import ExactAnswer, File\n\n\n@dataclass(frozen=True)\nclass AtSeven:\n"
        "    def __call__(self, response, new, decode, ended):\n        return len(response) + len(new) > 6\n\n\n"
        "def recipe():\n    file = lambda name: File(name, prompt='q', answer='a')\n"
        f"    return replace(run_recipe.recipe(), tasks=file({str(folder / 'train.jsonl')!r}), evals=file({str(folder / 'held.jsonl')!r}),\n"
        f"        examples=file({str(folder / 'worked.jsonl')!r}), rewards=ExactAnswer(), template='{{problem}}=', prompt_limit=60, steps=2,\n"
        "        answer=AtSeven(), eval_every=1, tokens_per_batch='auto')\n"
    )
    assert run("train", folder / "recipe.py", f"out={folder / 'run'}") == 0
    return folder


def test_eval_of_a_run_repeats_its_own_last_evaluation(shown: Path, tmp_path: Path):
    out = tmp_path / "found"
    assert run("eval", shown / "run", "--samples", 0, "--threads", 1, "--slots", 8, "--out", out) == 0
    row = json.loads((shown / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    (scores,) = json.loads((out / "results.json").read_text())["tasks"].values()
    assert scores["greedy"] == row["eval/greedy"]
    trees = [json.loads(line) for line in next(out.glob("*greedy.jsonl")).read_text().splitlines()]
    assert "4+3?=" in tokens_as_text(out, trees[0])
    assert {max(len(node["tokens"]) for node in tree["nodes"][1:]) for tree in trees} == {7}, "the run's own stop"
    assert "AtSeven" in json.loads((out / "eval.json").read_text())["settings"]["answer"]


def tokens_as_text(folder: Path, tree: dict) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer").decode(tree["nodes"][0]["tokens"])


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (("--examples", "none"), "3+1?="),
        (("--examples", "worked.jsonl"), "4+2?= 6\n\n4+3?= 7\n\n4+4?= 8\n\n3+1?="),
        (("--examples", "worked.jsonl", "--extract", "number", "--solution", "how"), "4+2?= 4+2=\n6\n\n4+3?= 4+3=\n7\n\n4+4?= 4+4=\n8\n\n3+1?="),
        ((), "4+2?= 6\n\n4+3?= 7\n\n4+4?= 8\n\n3+1?="),
    ],
)
def test_worked_examples_before_each_problem(shown: Path, tmp_path: Path, words: tuple[str, ...], prompt: str):
    words = tuple(str(shown / word) if word.endswith(".jsonl") else word for word in words)
    out = tmp_path / "trees"
    assert run("eval", shown / "run", *words, "--samples", 0, "--limit", 1, "--prompt-limit", 90, "--out", out) == 0
    (tree,) = (json.loads(line) for line in next(out.glob("*greedy.jsonl")).read_text().splitlines())
    assert tokens_as_text(out, tree).replace("<unk>", " ") == prompt, "a space is no letter of this model"


def test_where_an_answer_is_looked_for(shown: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, held = tmp_path / "found", shown / "held.jsonl"
    words = ("eval", shown / "run", "--tasks", held, "--samples", 3, "--out", out)
    assert run(*words, "--extract", "number") == 0
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["rewards"] == ["1 x exactanswer", "reading number"]
    answers = [attempt for row in next(iter(found["tasks"].values()))["answers"] for attempt in row["sampled"]] if "answers" in found else []
    assert all(attempt["verdict"]["answer"].lstrip("-").isdigit() for attempt in answers if attempt["verdict"]["answer"])
    capsys.readouterr()
    assert run(*words) == 2, "graded otherwise"
    assert "choose another --out" in capsys.readouterr().err
    assert run("eval", trained, "--extract", "number") == 2
    assert "what grades here, length, does not" in capsys.readouterr().err
    assert run("rollout", shown / "run", "--extract", "bax") == 2
    assert "an answer is looked for in box, number, line, whole, tag" in capsys.readouterr().err
    assert run("eval", shown / "run", "--examples", tmp_path / "no.jsonl") == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert run("eval", shown / "run", "--tasks", "lm_eval:gsm8k", "--extract", "number") == 2
    assert "of its own: leave out" in capsys.readouterr().err


def graded(task_id: str, *verdicts: dict[str, float]) -> Tree:
    from ramulus.core.task import Task

    tree = Tree.plant(Task(task_id, (1,), "t"))
    for verdict in verdicts:
        tree.add(tree.root, (2, 3), Author.POLICY, finish="eos", reward=verdict["reward"], verdict=verdict)
    return tree


def test_a_reward_beside_what_is_correct():
    rows = answers_of({"sampled": [graded("a", {"reward": 0.5, "correct": 1.0}, {"reward": -1.0, "correct": 0.0})]}, None)
    report = report_of(scores_of(rows, [1, 2]), rows)
    assert (report["mean@2"], report["pass@2"], report["reward"], report["intervals"]["reward"]) == (0.5, 1.0, -0.25, (-0.25, -0.25))
    plain = answers_of({"sampled": [graded("a", {"reward": 1.0, "correct": 1.0})]}, None)
    assert "reward" not in report_of(scores_of(plain, [1]), plain)["intervals"]  # it says the same
