"""What goes wrong in a Python file of the user's is one sentence with its line, before any work."""

from __future__ import annotations

import asyncio
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ramulus import (
    AdamW,
    Behavior,
    Boxed,
    BoxedAnswer,
    ByEntropy,
    Clip,
    Estimator,
    ExactAnswer,
    Fixed,
    GroupMean,
    Lora,
    Mix,
    Star,
    Sums,
    Term,
    Weighted,
)
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.engine.local.factory import Local
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.sharded.factory import Sharded
from ramulus.recipes import grpo
from ramulus.run.config.describe import recipe_text, to_json
from ramulus.run.config.find import stages_of
from ramulus.run.config.override import override
from ramulus.run.config.python_file import read_file
from ramulus.run.config.resume import prepare
from ramulus.run.config.yaml_file import to_yaml
from ramulus.tasks.guard import Guarded

HEAD = """from dataclasses import replace
from ramulus import AdamW, Boxed, ExactAnswer, FinalEvaluation, Local, Segments, Star
from ramulus.recipes import grpo


def recipe():
    return replace(grpo.recipe(), {})
"""


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('steps="2"', "Run: steps must be a whole number, got '2': leave out the quotes"),
        ("steps=2.0", "Run: steps must be a whole number, got 2.0: write 2"),
        ("eval_limit=0", "eval_limit must be at least 1 (None takes all), got 0"),
        ("eval_limit=-1", "eval_limit must be at least 1"),
        ("final_evaluation=FinalEvaluation(limit=-1)", "final_evaluation.limit must be at least 1 (None takes all problems), got -1"),
        ("eval_every=True", "eval_every must be a whole number, got True"),
        ('autocast="yes"', "autocast must be true or false or auto, got 'yes'"),
        ("out=3", "out must be text, got 3"),
        ('on_long="dorp"', "on_long must be one of error, drop, got 'dorp'"),
        ("prompt_limit=None", "prompt_limit must be a whole number, got None"),
        ("tasks=[1, 2]", 'tasks must be a part that can be called, File("problems.jsonl") say, got [1, 2]'),
        ('evals="x.jsonl"', 'evals must be a part that can be called, File("held-out.jsonl") say'),
        ("branching=8", "branching must be a part that can be called, Star(8) say, got 8"),
        ("mix=3", "mix must be a Mix of terms, got 3"),
        ("optimizer=3", "optimizer must be AdamW(...), got 3"),
        ("final_evaluation=True", "final_evaluation must be FinalEvaluation(...) or None, got True"),
        ("rewards=[Boxed()]", "rewards must be a part that can be called or a tuple of such parts"),
        ('temperature="hot"', "temperature must be a number or a rule on the logits, got 'hot'"),
        ('branching=Star("8")', "Star: n must be a whole number, got '8': leave out the quotes"),
        ("branching=Star(8, 9)", "Star.__init__() takes 2 positional arguments but 3 were given"),
        ("branching=Segments(width=8)", "missing 2 required positional arguments: 'depth' and 'length'"),
        ('optimizer=AdamW(lr="1e-6")', "AdamW: lr must be a number, got '1e-6': leave out the quotes"),
        ('engine=Local(slots="3")', "Local: slots must be a whole number"),
        ("optimizer=AdamW(learning_rate=1e-6)", "AdamW has no field 'learning_rate'. Did you mean optimizer.lr?"),
        ("stepz=3", "Run has no field 'stepz'. Did you mean steps?"),
        ("epochs=3", "steps = epochs x problems / schedule.prompts"),
        ("steps=nothing", "NameError: name 'nothing' is not defined"),
        ("steps=1 if else", "invalid syntax: 'return replace(grpo.recipe(), steps=1 if else)'"),
        ("steps={}['x']", "KeyError: 'x'"),
        ("steps=exit(3)", "SystemExit: 3"),
        ("steps=1 / 0", "ZeroDivisionError: division by zero"),
        ("steps=int('x')", "ValueError: invalid literal for int()"),
        ("steps=open('/nowhere/at/all')", "FileNotFoundError: [Errno 2] No such file or directory"),
        ("steps=0", "steps must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_file(tmp_path: Path, field: str, said: str):
    file = tmp_path / "mine.py"
    file.write_text(HEAD.replace("{}", field, 1))
    with pytest.raises(ValueError, match=r"mine\.py") as error:
        stages_of(str(file))
    assert str(error.value).startswith(f"{file}, line 7: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import nowhere_at_all", 1, "No module named 'nowhere_at_all'"),
        ("x = 1\n\n\ndef f(:\n", 4, "invalid syntax"),
        ("x = 1\nif x:\nprint(x)\n", 3, "expected an indented block"),
        ("from ramulus import Stra", 1, "cannot import name 'Stra'"),
        ("from ramulus import AdamW\n\nAdamW(eps=-1)", 3, "eps above 0"),
        ("def f():\n    raise RuntimeError('no')\n\nf()", 2, "RuntimeError: no"),
    ],
)
def test_a_mistake_while_a_file_is_read(tmp_path: Path, text: str, line: int, said: str):
    file = tmp_path / "rewards.py"
    file.write_text(text)
    with pytest.raises((ValueError, ImportError)) as error:
        read_file(str(file), "give FILE.py:FUNCTION", "reward")
    assert f"{file}, line {line}: " in str(error.value)
    assert said in str(error.value)


ONE = HEAD.replace("{}", "steps=1") + """
class Plain:
    where = "PLACE"
    def __call__(self, task, path):
        return float("PLACE" == "b")


def score(task, path):
    return float("PLACE" == "b")
"""


def test_two_files_of_one_name_are_told_apart(tmp_path: Path):
    files = {}
    for place in "ab":
        (tmp_path / place).mkdir()
        files[place] = tmp_path / place / "other.py"
        files[place].write_text(ONE.replace("PLACE", place))
    stages = stages_of(str(files["a"]))
    (run,) = override(stages, [f"rewards={files['b']}:score"])
    assert f"rewards: {files['b']}:score" in to_yaml(str(files["a"]), (run,))
    (tmp_path / "run.yaml").write_text(to_yaml(str(files["a"]), (run,)))
    assert stages_of(str(tmp_path / "run.yaml"))[0].rewards(None, None) == 1.0
    one, other = read_file(str(files["a"]), ""), read_file(str(files["b"]), "")
    assert (pickle.loads(pickle.dumps(one.Plain)).where, pickle.loads(pickle.dumps(other.Plain)).where) == ("a", "b")
    asked = Task("t", (1,), "t"), Response("x", (1,), "eos")
    assert [asyncio.run(Guarded(found, workers=1)(*asked)) for found in (one.score, other.score)] == [0.0, 1.0]  # in another process
    assert read_file(str(files["b"]), "").__name__ == other.__name__  # each time


def test_a_mistake_is_told_of_the_file_that_it_is_in(tmp_path: Path):
    for place in "ab":
        (tmp_path / place).mkdir()
    inner = tmp_path / "b" / "same.py"
    inner.write_text("\n\n\n\ndef fail():\n    return {}['x']\n")
    outer = tmp_path / "a" / "same.py"
    outer.write_text(f"import runpy\nfail = runpy.run_path({str(inner)!r})['fail']\nfail()\n")
    with pytest.raises(ValueError, match=r"same\.py, line 3: KeyError"):
        read_file(str(outer), "")


def test_a_recipe_of_right_types_is_left_alone(tmp_path: Path):
    fine = "optimizer=AdamW(lr=1), eval_limit=None, rewards=(Boxed(), ExactAnswer()), temperature=1, threads=1"
    (tmp_path / "mine.py").write_text(HEAD.replace("{}", fine, 1))
    (run,) = stages_of(str(tmp_path / "mine.py"))
    assert [name for _, _, name in run.weighted()] == ["boxed", "exactanswer"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("pyproject.toml", "a repository or a package"), ("config.json", "a model"), ("mine.py", "programs"), (None, "the files that you work on")],
)
def test_a_run_is_not_written_among_other_files(name: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`out=.` and `out=../my-model`: refused before anything is written there."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / (name or "notes.txt")).write_text("mine")
    if name is None:
        monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"holds {said}.*name a folder of its own"):
        prepare(str(Path(__file__).parent / "run_recipe.py"), [f"out={'.' if name is None else folder}"])
    assert [path.name for path in folder.iterdir()] == [name or "notes.txt"]


def test_a_run_may_be_written_beside_a_log(tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").write_text("began")
    (tmp_path / "recipe.py").write_text("# of a run that was killed before it wrote run.json")
    with prepare(str(Path(__file__).parent / "run_recipe.py"), [f"out={tmp_path}"]).held:
        pass


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("engine", Local), ("learner", Torch), ("learner", Sharded), ("rewards", Boxed), ("tasks", Sums), ("branching", Star), ("schedule", Fixed),
        ("answer", BoxedAnswer), ("lora", Lora), ("optimizer", AdamW), ("temperature", ByEntropy),
    ],
)  # fmt: skip
def test_a_class_in_place_of_an_object_is_refused(field: str, kind: type) -> None:
    with pytest.raises(ValueError, match=rf"{field} is the class {kind.__name__}: write {kind.__name__}\(\)"):
        replace(grpo.recipe(), **{field: kind})


def test_a_class_in_a_tuple_or_a_part_is_refused_by_its_place() -> None:
    for rewards, path in (((Boxed(), ExactAnswer), "rewards.1"), ((Weighted(Boxed),), "rewards.0.reward"), (Guarded(Boxed), "rewards.reward")):
        with pytest.raises(ValueError, match=rf"^{path} is the class \w+: write \w+\(\)"):
            replace(grpo.recipe(), rewards=rewards)
    estimator = Estimator(Clip, Behavior(), GroupMean())
    with pytest.raises(ValueError, match=r"^mix.terms.0.estimator.mask is the class Clip: write Clip\(\)"):
        replace(grpo.recipe(), mix=Mix((Term(estimator),)))

    class Build:
        """What builds an engine when it is called may be a class."""

        def __init__(self, model: Any, decode: Any) -> None: ...

    assert replace(grpo.recipe(), engine=Build).engine is Build


def test_numbers_of_numpy_are_taken_as_the_numbers_they_are() -> None:
    optimizer = AdamW(lr=np.float32(0.5), betas=(np.float32(0.5), 0.999), warmup=np.int32(3))  # type: ignore[arg-type]
    run = replace(grpo.recipe(), seed=np.int64(3), steps=np.int64(9), optimizer=optimizer, rewards=(Weighted(Boxed(), np.float32(2)),))  # type: ignore[arg-type]
    plain = replace(grpo.recipe(), seed=3, steps=9, optimizer=AdamW(lr=0.5, betas=(0.5, 0.999), warmup=3), rewards=(Weighted(Boxed(), 2.0),))
    assert recipe_text(run) == recipe_text(plain)
    assert json.dumps(to_json(run)) == json.dumps(to_json(plain))
    assert "np." not in recipe_text(replace(run, temperature=np.float64(0.7)))
    for fields, words in (
        ({"activation_checkpointing": np.True_}, "must be true or false, got np.True_: write True"),
        ({"seed": torch.tensor(3)}, r"must be a whole number, got tensor\(3\): write 3"),
        ({"seed": np.float32(3)}, "must be a whole number, got 3.0: write 3"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(run, **fields)
    with pytest.raises(ValueError, match=r"template_arguments\.budget: int64 cannot stand in a recipe: write 3"):
        to_json(replace(run, template_arguments={"budget": np.int64(3)}))
