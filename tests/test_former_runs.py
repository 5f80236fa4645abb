"""A run that was written before the package was called ramulus: read, shown, accounted for and gone on with."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

import ramulus
from ramulus.cli import main
from ramulus.core.run_folder import final_evaluation
from ramulus.core.store import read
from ramulus.look.cost.statement import read_statement
from ramulus.run.config.describe import brought_forward
from ramulus.run.config.find import find, stages_of
from ramulus.run.config.override import override
from ramulus.run.config.resume import read_saved

RUN = Path(__file__).parent / "data" / "run-0.1"
RECIPE = str(Path(__file__).with_name("run_recipe.py"))


def done(*words: str) -> bool:
    """Whether the command line ends well."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code in (0, None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run in a folder of its own, as its recipe and folder are full paths."""
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder)
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace("RECIPE", RECIPE).replace("OUT", str(folder)))
    return folder


def test_its_run_goes_on(run: Path, capsys: pytest.CaptureFixture[str]):
    assert done("train", RECIPE, f"out={run}", "steps=4", "--resume")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert "cannot resume" not in "".join(capsys.readouterr())


def test_its_trees_are_read(run: Path):
    forest = [tree for path in sorted((run / "trees").iterdir()) for tree in read(path)]
    assert {tree.step for tree in forest} == {1, 2}
    nodes = [node for tree in forest for node in tree.root.walk()]
    assert all(len(node.logprobs) in (0, len(node.tokens)) for node in nodes)
    assert {name for node in nodes for name in node.signals if "reference" in name or name == "frozen"} == {"reference_model"}


def test_its_ledger_and_comparison_are_shown(run: Path, capsys: pytest.CaptureFixture[str]):
    assert done("ledger", str(run))
    assert done("compare", str(run))
    shown = capsys.readouterr().out
    assert "2 steps, 10 trees" in shown
    assert "one seed only" in shown


def test_the_recipe_that_joins_everything_has_its_new_name(run: Path):
    path = run / "run.json"
    saved = json.loads(path.read_text())
    saved["recipe"], saved["stages"][0]["name"] = "ramify:small", "ramify"
    path.write_text(json.dumps(saved))
    read = read_saved(path)
    assert (read["recipe"], read["stages"][0]["name"]) == ("ramulus:small", "ramulus")
    assert read["stages"][0]["branching"]["class"] == "ramulus.Segments"


def test_a_recipe_that_imports_the_former_name_is_told_the_new_one(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("from ramify import Run\n")
    with pytest.raises(ImportError, match=r"mine\.py imports ramify, which is called ramulus now"):
        find(str(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("from ramulus.learn.mask import Everything, Clip", "from ramulus import Everything, Clip"),
        ("from ramulus.run.recipe import Weighted", "from ramulus import Weighted"),
        ("from ramulus.learn.advantage import (\n    GroupMean,\n    Raw,\n)", "import GroupMean"),
        ("from ramulus import Exam", "from ramulus import FinalEvaluation"),
        ("from ramify.learn.mix import Mix\nfrom ramify.run.recipe import AdamW, Exam", "from ramulus import Mix, AdamW, FinalEvaluation"),
    ],
)
def test_what_has_moved_is_told_with_the_line_that_imports_it(tmp_path: Path, text: str, line: str):
    path = tmp_path / "mine.py"
    path.write_text(text + "\n")
    with pytest.raises(ImportError, match=r"mine\.py.*(any more|is called ramulus now)") as error:
        find(str(path))
    assert line in str(error.value)


def test_a_former_class_asked_of_the_package_is_told_by_its_new_name():
    with pytest.raises(AttributeError, match="no attribute 'Exam': write from ramulus import FinalEvaluation"):
        _ = ramulus.Exam
    assert not hasattr(ramulus, "Nowhere")


def test_a_field_by_its_former_name_is_told_the_new_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Mix has no field 'leash' any more, it is mix\.kl_coef"):
        override(stages_of(RECIPE), ["mix.leash=0.02"])
    with pytest.raises(ValueError, match=r"Local has no field 'copy' any more, it is engine\.precision"):
        override(stages_of(RECIPE), ["engine.copy=bfloat16"])
    path = tmp_path / "mine.py"
    path.write_text("from ramulus import Mix\n\n\ndef recipe():\n    return Mix((), leash=0.1)\n")
    with pytest.raises(ValueError, match=r"Mix has no field 'leash' any more, it is mix\.kl_coef"):
        stages_of(str(path))


def test_what_was_set_by_its_former_name_is_kept(run: Path):
    saved = json.loads((run / "run.json").read_text())
    saved["overrides"].append("mix.leash=0.02")
    (run / "run.json").write_text(json.dumps(saved))
    read = read_saved(run / "run.json")
    assert read["overrides"][-1] == "mix.kl_coef=0.02"
    assert read["stages"][0]["mix"]["kl_coef"] == 0.01


def test_a_class_and_a_field_by_their_former_names_are_told_the_new_ones(tmp_path: Path):
    for assignment in ("exam.limit=3", "exam=None", "treepo.exam.samples=2"):
        with pytest.raises(ValueError, match=r"Run has no field 'exam' any more, it is final_evaluation"):
            override(stages_of("quickstart"), [assignment])
    path = tmp_path / "mine.py"
    for home in ("ramulus", "ramulus.run.config.recipe"):
        path.write_text(f"from {home} import Exam\n")
        with pytest.raises(ImportError, match=rf"{home} has no 'Exam' any more, it is FinalEvaluation: write from ramulus import FinalEvaluation"):
            find(str(path))
    head = "from dataclasses import replace\nfrom ramulus.recipes import grpo\n\n\n"
    path.write_text(head + "def recipe():\n    return replace(grpo.recipe(), exam=None)\n")
    with pytest.raises(ValueError, match=r"Run has no field 'exam' any more, it is final_evaluation"):
        stages_of(str(path))


def test_what_was_set_of_a_stage_by_its_former_name_is_kept(run: Path):
    path = run / "run.json"
    saved = json.loads(path.read_text())
    stage, name = saved["stages"][0], saved["stages"][0]["name"]
    stage["exam"] = {"class": "ramify.run.recipe.Exam", "tasks": None, "samples": 2, "temperatures": [0.5], "limit": None}
    saved |= {"format": 2, "overrides": [f"{name}.exam.samples=2", f"{name}.mix.leash=0.5", "exam.limit=4", "examine=1"]}
    path.write_text(json.dumps(saved))
    read = read_saved(path)
    now = [f"{name}.final_evaluation.samples=2", f"{name}.mix.kl_coef=0.5", "final_evaluation.limit=4", "examine=1"]
    assert read["overrides"] == now
    assert read["stages"][0]["final_evaluation"]["class"] == "ramulus.FinalEvaluation"
    assert "exam" not in read["stages"][0]


def test_its_final_evaluations_are_found(run: Path):
    assert final_evaluation(run, "after").name == "evaluation-after.json"
    (run / "exam-after.json").write_text(json.dumps({"step": 2, "greedy": 0.5, "seconds": 3.0}))
    assert final_evaluation(run, "after").name == "exam-after.json"
    assert read_statement(run).evaluations == 3.0


def test_a_former_name_is_changed_in_its_own_class_alone():
    mine = {"class": "mine.Task", "leash": {"class": "ramify.learn.mix.Mix", "leash": 0.1}}
    engine = {"class": "ramulus.Local", "slots": 64, "copy": "bfloat16"}
    assert brought_forward(engine) == {"class": "ramulus.Local", "slots": 64, "precision": "bfloat16"}
    assert brought_forward(mine) == {"class": "mine.Task", "leash": {"class": "ramulus.Mix", "kl_coef": 0.1}}


def test_what_goes_on_otherwise_is_said_with_what_goes_on_as_before() -> None:
    """Fields whose default is not what was done before there were any."""
    from ramulus.run.config.describe import to_json
    from ramulus.run.config.resume import _compare, build, since_then

    words = ["mix.kl_coef=0.1"]
    (stage,), _ = build("grpo:small", words)
    saved = to_json(stage)
    assert since_then(saved, stage) == []
    del saved["mix"]["kl"], saved["mix"]["terms"][0]["estimator"]["advantage"]["lone"]
    one, other = since_then(saved, stage)
    assert "is clamped now" in one
    assert "earns 0 now" in other
    said = [word for note in (one, other) for word in note.partition(": ")[2].removesuffix(" goes on as before").split()]
    (as_before,), _ = build("grpo:small", [*words, *said])
    assert since_then(saved, as_before) == []
    assert (as_before.mix.kl.estimator, as_before.mix.kl.clamp) == ("k3", None)
    assert as_before.mix.terms[0].estimator.advantage.lone == "reward"
    assert len(_compare([saved], [to_json(as_before)], (as_before,))) == 2  # what the words set is no change of the shape
    with pytest.raises(ValueError, match=r"mix.kl.clamp was .*Such a change makes it another run"):
        _compare([to_json(stage)], [to_json(as_before)], (as_before,))


def test_a_field_that_was_not_there_is_not_set_back_by_a_word() -> None:
    from ramulus.run.config.describe import to_json
    from ramulus.run.config.resume import _compare, build

    (stage,), _ = build("grpo:small", ["on_long=drop"])
    saved = to_json(stage)
    del saved["on_long"]
    with pytest.raises(ValueError, match=r"on_long was None, is now 'drop'.*: undo it, or begin"):
        _compare([saved], [to_json(stage)], (stage,))


@pytest.mark.parametrize(
    ("recipe", "before", "after"),
    [
        ("treepo", ["model.dtype=float32"], []),
        ("grpo", ["model.dtype=float32", "prompt_limit=900", "tasks.limit=7"], []),
        ("quickstart", ["treepo.seed=3", "sft.on_long=drop"], ["prompt_limit=17"]),
        ("grpo:small", [], ["template=Q: {problem}\n"]),
        ("grpo:small", ["template=It's {problem} ?"], ["system=be brief"]),
    ],
)
def test_what_would_make_it_another_run_is_refused_with_the_words_that_go_on(recipe: str, before: list[str], after: list[str]) -> None:
    """A run of before the shipped recipes held their weights in bfloat16, and other fields that are fixed."""
    from ramulus.run.config.describe import to_json
    from ramulus.run.config.resume import _compare, build

    then, (now, _) = [to_json(stage) for stage in build(recipe, before)[0]], build(recipe, after)
    with pytest.raises(ValueError, match=r"another run: go on with .*, or begin a new run") as refused:
        _compare(then, [to_json(stage) for stage in now], now)
    said = shlex.split(str(refused.value).partition("go on with ")[2].partition(", or begin")[0])
    back, _ = build(recipe, [*after, *said])
    assert _compare(then, [to_json(stage) for stage in back], back) == []
