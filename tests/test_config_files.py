"""A configuration as YAML, and every field of a recipe on the screen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ramulus.cli import main
from ramulus.core.tree import Author
from ramulus.grow.branching import Star
from ramulus.learn.policy.lora import Lora
from ramulus.run.config.describe import to_json
from ramulus.run.config.field_list import comments_of, field_rows
from ramulus.run.config.find import FOLDER, absolute, shipped, stages_of, variants
from ramulus.run.config.override import override
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.config.yaml_file import to_yaml
from ramulus.tasks.files import File

SHIPPED = [f"{name}:{function}" for name in shipped() for function in variants(FOLDER / f"{name}.py")]


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_comes_back_from_yaml(tmp_path: Path, recipe: str):
    stages = stages_of(recipe)
    for base in (absolute(recipe), None):
        back = stages_of(written(tmp_path, to_yaml(base, stages)))
        assert back == stages
        assert to_json(back) == to_json(stages)


def test_a_few_fields_over_a_recipe(tmp_path: Path):
    few = """
steps: 7
model: a/b
optimizer: {lr: 2e-6}
evals: {path: held.jsonl, prompt: question}
lora: {rank: 8}
answer: true
repetition:
branching: {class: Segments, width: 4, depth: 3, length: 5}
rewards: ExactAnswer
response_limit: 1024
mix: {kl_coef: 1, terms: [{coefficient: 2}]}
"""
    words = ["steps=7", "model=a/b", "optimizer.lr=2e-6", "evals=held.jsonl", "evals.prompt=question", "lora.rank=8", "answer=true"]
    words += ["rewards=ExactAnswer", "response_limit=1024", "mix.kl_coef=1", "mix.terms.0.coefficient=2", "repetition=none"]
    named = stages_of(written(tmp_path, f"recipe: grpo\n{few}"))
    assert named == stages_of(f"{written(tmp_path, few, 'few.yaml')}:grpo")
    (run,) = named
    (expected,) = override(stages_of("grpo"), words)
    assert to_json(run) | {"branching": None} == to_json(expected) | {"branching": None}
    assert (run.branching.width, run.branching.length, run.branching.branching) == (4, 5, 2)
    assert (run.optimizer, run.lora) == (AdamW(2e-6, warmup=10, weight_decay=0.1), Lora(8))
    assert run.evals == File("held.jsonl", prompt="question")


def test_stages_by_their_names(tmp_path: Path):
    first, second = stages_of(written(tmp_path, "recipe: quickstart\nseed: 3\nstages:\n- {name: treepo, steps: 9}\n"))
    assert (first.seed, second.seed, second.steps) == (3, 3, 9)
    assert first.steps == stages_of("quickstart")[0].steps
    with pytest.raises(ValueError, match=r"run\.yaml: the recipe has no stage 'rl': it has sft, treepo"):
        stages_of(written(tmp_path, "recipe: quickstart\nstages:\n- {name: rl, steps: 9}\n"))


def test_parts_of_ones_own_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, replace\nfrom ramulus.recipes import grpo\nfrom ramulus import Weighted\n"
        "def score(task, path):\n    return 0.5\n"
        "@dataclass(frozen=True)\nclass Longer:\n    than: int = 3\n    def __call__(self, task, path):\n        return 0.0\n"
        "def recipe():\n    return replace(grpo.recipe(), rewards=(Weighted(score, 0.5), Weighted(Longer(5), name='longer')))\n"
    )
    stages = stages_of(str(tmp_path / "mine.py"))
    for base in ("mine.py", None):  # beside the file
        (back,) = stages_of(written(tmp_path, to_yaml(base, stages)))
        assert to_json(back) == to_json(stages[0])
        assert [reward.reward(None, None) for reward in back.rewards] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: grpo\nsteps: [1", r"run\.yaml, line \d is no YAML"),
        ("- 1\n", "must be a mapping of fields to values"),
        ("recipe: grop\n", "Did you mean grpo"),
        ("recipe: grpo\nstepz: 1\n", r"stepz: Run has no field 'stepz'. Did you mean steps\?"),
        ("recipe: grpo\nlr: 1\n", r"Did you mean optimizer.lr\?"),
        ("recipe: grpo\nepochs: 1\n", "steps = epochs x problems"),
        ("recipe: grpo\nsteps: '2.5'\n", "'2.5' is not a whole number"),
        ("recipe: grpo\nsteps: 2.5\n", "steps must be a whole number, got 2.5"),
        ("recipe: grpo\nsteps: 0\n", "steps must be at least 1"),
        ("recipe: grpo\nbranching: {class: Strait, n: 3}\n", "branching: there is no class 'Strait'"),
        ("recipe: grpo\nbranching: {class: Segments, width: 3}\n", "branching is to be Segments, which needs depth"),
        ("recipe: grpo\nbranching: {class: os.system}\n", "there is no class 'os.system'"),
        ("recipe: grpo\nbranching: 8\n", "branching must be a part that can be called"),
        ("recipe: grpo\nbranching: Star\n", "branching is an object, Star"),
        ("recipe: grpo\noptimizer: {betas: [0.9]}\n", "optimizer.betas must be"),
        ("recipe: grpo\nrewards: Nothing\n", "there is no reward 'Nothing'"),
        ("steps: 3\n", "Run is to be Run, which needs"),
        ("recipe: grpo\noptimizer: {lr: null}\n", r"run\.yaml: optimizer\.lr must be a number, got None: leave it out"),
        ("recipe: grpo\noptimizer: {betas: 0.9}\n", r"optimizer\.betas must be a list like a,b of a number, got 0\.9: write a list"),
        ("recipe: grpo\nschedule: {prompts: null}\n", r"schedule\.prompts must be a whole number, got None"),
        ("recipe: grpo\nbranching: {n: [1]}\n", r"branching\.n must be a whole number, got \(1,\): write 1 alone"),
        ("recipe: grpo\nbranching: {n: {a: 1}}\n", r"branching\.n must be a whole number, got \{'a': 1\}"),
        ("recipe: grpo\nmix: {terms: {coefficient: 2.0}}\n", r"mix\.terms is a list, got \{'coefficient': 2\.0\}: write \["),
        ("recipe: grpo\nmix: {terms: [null]}\n", r"mix\.terms must be .*, got \(None,\)"),
        ("recipe: grpo\nmix: {terms: [{authors: [Author.TEACHER]}]}\n", r"authors\.0 must be one of .*Author\.POLICY.*'Author\.TEACHER'"),
        ("recipe: grpo\nmix: {terms: [{authors: [77]}]}\n", r"authors\.0 must be one of .*, got 77"),
        ("recipe: grpo\nmix: {kl: null}\n", r"mix\.kl must be KL\(\.\.\.\), got None"),
        ("recipe: grpo\nlora: [1]\n", r"lora is an object or None, got \(1,\)"),
        ("recipe: grpo\nfinal_evaluation: {temperatures: [hot]}\n", r"final_evaluation\.temperatures\.0='?hot"),
        ("recipe: quickstart\nstages:\n- {name: treepo, optimizer: {warmup: null}}\n", r"optimizer\.warmup must be a whole number, got None"),
        ("recipe: 5\n", r"run\.yaml: recipe must be the name or the file of a recipe, got 5"),
        ("recipe: [grpo]\n", r"recipe must be the name or the file of a recipe, got \['grpo'\]"),
        ("recipe: !!python/object/apply:os.getcwd []\n", "is no YAML"),
        ("recipe: grpo\nsteps: 7\nsteps: 9\n", r"line 3 is no YAML: 'steps' stands there twice"),
        ("recipe: grpo\noptimizer: {lr: 1.0e-5, lr: 2.0e-5}\n", r"line 2 is no YAML: 'lr' stands there twice"),
        ("recipe: quickstart\nstages:\n- {name: treepo, steps: 9}\n- {name: treepo, seed: 1}\n", "stages has two stages of one name"),
    ],
)
def test_a_file_that_cannot_be(tmp_path: Path, text: str, said: str):
    with pytest.raises(ValueError, match=said):
        stages_of(written(tmp_path, text))


def test_what_all_stages_are_given_lies_under_what_one_says_of_the_same_part(tmp_path: Path):
    text = "recipe: quickstart\noptimizer: {lr: 1.0e-5, weight_decay: 0.1}\nstages:\n- {name: treepo, optimizer: {warmup: 3}}\n"
    first, second = (stage.optimizer for stage in stages_of(written(tmp_path, text)))
    assert (first.lr, first.weight_decay, second.lr, second.weight_decay, second.warmup) == (1e-5, 0.1, 1e-5, 0.1, 3)
    assert first.warmup == stages_of("quickstart")[0].optimizer.warmup
    rules = "branching: {class: Segments, width: 8, depth: 2, length: 4}\nstages: [{name: treepo, branching: {class: Star, n: 3}}]\n"
    text = f"recipe: quickstart\n{rules}"
    assert stages_of(written(tmp_path, text))[1].branching == Star(3)


def test_members_of_enumerations_and_days(tmp_path: Path):
    for author in ("EXPERT", "Author.EXPERT", int(Author.EXPERT)):
        (stage,) = stages_of(written(tmp_path, f"recipe: grpo\ndate: 2026-11-29\nmix: {{terms: [{{authors: [{author}]}}]}}\n"))
        assert stage.mix.terms[0].authors == (Author.EXPERT,)
        assert stage.date == "2026-11-29"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


@pytest.mark.usefixtures("torch_as_it_was")
def test_a_run_by_a_configuration_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    recipe = str(Path(__file__).parent / "run_recipe.py")
    assert run("config", recipe, "steps=1", "seed=5") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["steps"] == 1
    file = written(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert run("train", "--config", "run.yaml", "out=here") == 0
    saved = json.loads((tmp_path / "here" / "run.json").read_text())
    assert (saved["recipe"], saved["stages"][0]["seed"]) == (file, 5)
    assert run("train", "out=here", "--resume", "--config=run.yaml", "steps=2") == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out
    assert run("train", "--config", "gone.yaml") == 2
    assert "`ramulus config RECIPE > gone.yaml` writes one" in capsys.readouterr().err
    assert run("train", "--config", "mine.py") == 2
    assert "takes a YAML file" in capsys.readouterr().err


def test_every_field_is_listed_with_its_comment():
    for recipe in ("treepo", "hapo", "quickstart"):
        for stage in stages_of(recipe):
            rows = {path: row for path, *row in field_rows(stage)}
            assert [field.name for field in fields(Run)] == [path for path in rows if "." not in path]
            for path, (kind, _, _) in rows.items():
                part: Any = stage
                for name in path.removesuffix(".*").split("."):
                    part = part[int(name)] if isinstance(part, tuple) else getattr(part, name)
                assert kind or path.endswith(".*"), path
                if not path.endswith(".*") and not is_dataclass(part) and kind != "an object" and not isinstance(part, dict | tuple):
                    override((stage,), [f"{path}={part}"])  # what is shown can be set
    rows = {path: tuple(row) for path, *row in field_rows(stages_of("treepo")[0])}
    assert rows["steps"] == ("a whole number", "400", "")
    assert rows["threads"][0] == "a whole number or None"
    assert rows["optimizer.lr"][:2] == ("a number", "1e-06")
    assert rows["optimizer.warmup"][2] == "steps of linear rise to `lr`"
    assert rows["check_demonstrations"][2].startswith("by the rewards")
    assert rows["on_long"][0] == "one of error, drop"
    assert rows["lora.*"][2] == "fields of Lora: rank, alpha, targets"
    assert comments_of(Run)["model"].startswith("Pretrained(...), Scratch(...), or a folder")


def test_help_of_a_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("train", "--help", "quickstart", "branching.width=16") == 0
    said = capsys.readouterr().out
    for words in ("stage sft", "stage treepo", "branching.width", "a whole number", "steps of linear rise", "--dry-run"):
        assert words in said
    assert run("train", "quickstrat", "--help") == 2
    assert "Did you mean quickstart?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--version"], 0, "ramulus 0."),
        (["train", "grop"], 2, "Did you mean grpo?"),
        (["train", "grpo:smal"], 2, "has no function smal()"),
        (["plan", "grop"], 2, "Did you mean grpo?"),
        (["sweep", "grop", "--seeds", "0", "--out", "x"], 2, "Did you mean grpo?"),
        (["train"], 2, "name a recipe first"),
        (["train", "steps=3"], 2, "name a recipe first"),
        (["train", "--config", "gone.yaml"], 2, "no configuration at gone.yaml"),
        (["--tyro-print-completion", "bash"], 0, "ramulus"),
    ],
)
def test_quick_answers_import_no_torch(words: list[str], status: int, said: str):
    script = (
        "import sys, time\nfrom ramulus.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules); sys.stderr.write(f'took {time.process_time()}')"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr
    assert float(done.stderr.rpartition("took ")[2]) < 1.0


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize("recipe", ["run_recipe.py", "run_recipe.py:stages"])
def test_a_dry_run_builds_everything_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str
):
    file = str(Path(__file__).parent / recipe)
    monkeypatch.chdir(tmp_path)
    assert run("train", file, "--dry-run", "steps=4", "out=here", "final_evaluation=none", "eval_every=2") == 0
    said = capsys.readouterr().out
    for stage in stages_of(file):
        assert f"{stage.name}: 4 steps, into here" in said
    assert re.search(r"a step: \d+ trees of \d+ paths.*; at most [\d,]+ tokens sampled and [\d,]+ trained", said)
    assert re.search(r"here: [\d,]+ tokens sampled and [\d,]+ trained a second", said)
    assert re.search(r"; about [\d,]+ tokens sampled and [\d,]+ trained, as the model answers now", said)
    assert re.search(r"so a step takes about [\d.]+ s( to [\d.]+ s)? and the run about [\d.: sto]+, [\d.]+ s of it for evaluations", said)
    assert re.search(r"memory: at most [\d.]+ GB", said)
    assert "nothing was trained and nothing written" in said
    assert list(tmp_path.iterdir()) == []
    assert run("train", file, "--dry-run", "prompt_limit=4") == 2
    assert "the limit is 4" in capsys.readouterr().err


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize("words", [[], ["response_limit=6", "schedule.prompts=7"]])
def test_a_dry_run_says_about_what_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]):
    file = str(Path(__file__).parent / "run_recipe.py")
    asked = [file, "steps=1", f"out={tmp_path / 'run'}", "eval_every=0", *words]
    assert run("train", *asked, "--dry-run") == 0
    sampled, trained = re.findall(r"about ([\d,]+) tokens sampled and ([\d,]+) trained", capsys.readouterr().out)[0]
    assert run("train", *asked) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert int(sampled.replace(",", "")) == pytest.approx(row["sampled"], rel=0.3)
    assert int(trained.replace(",", "")) == pytest.approx(row["trained"], rel=0.3)
