"""The command line: help, errors in one sentence before any work, real files end to end, evaluation, rollouts, export."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ramulus import cli
from ramulus.cli import COMMANDS, main
from ramulus.run.evaluation.own_run import trained_by
from ramulus.run.runtime import model_path

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_recipe.py")
DATA = HERE.parent.parent / "shared" / "data"
ENV = os.environ | {"PYTHONPATH": str(HERE.parent / "src")}

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def run(*words: object) -> int:
    """The exit status of a command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence that a command refuses with."""
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("ramulus: ")
    assert "Traceback" not in said
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder that knows every printable character."""
    from ramulus.learn.policy.model import Scratch

    folder = tmp_path_factory.mktemp("model") / "tiny"
    net, tokenizer = Scratch(string.printable, hidden=16, layers=1, heads=2, kv_heads=1, max_positions=4096)()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(6))
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", RECIPE, f"out={out}", "steps=1") == 0
    return out


def test_help_and_the_list_of_recipes_need_no_torch():
    script = "import sys\nfrom ramulus.cli import main\ntry: main(sys.argv[1:])\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    for words in (
        ["--help"],
        *([command, "--help"] for command in ("train", "eval", "rollout", "export")),
        ["recipes"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], env=ENV, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 200
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_needs(capsys: pytest.CaptureFixture[str], command: str):
    assert run(command, "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    may_be_empty = {"eval": 2, "rollout": 1, "doctor": 2}  # --tasks and --k; --address and --shared
    assert said.count("(default: )") == may_be_empty.get(command, 0)
    assert command in str(cli.__doc__)


def test_every_shipped_recipe_is_listed_and_builds(capsys: pytest.CaptureFixture[str]):
    from ramulus.run.config.find import shipped
    from ramulus.run.config.resume import build

    assert run("recipes") == 0
    said = capsys.readouterr().out
    assert {"quickstart", "sft", "grpo", "dapo", "treepo"} <= shipped().keys()
    for name, about in shipped().items():
        assert name in said
        assert about.endswith(".")
        stages, folder = build(name, ["steps=3"])
        assert all(stage.steps == 3 for stage in stages)
        assert folder == Path("runs") / name


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]):
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said
    assert "cores" in said
    assert re.search(r"free memory +[\d.]+ GB", said)


def test_doctor_says_what_would_happen_with_a_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoTokenizer

    from architectures import build

    monkeypatch.setenv("COLUMNS", "400")
    capsys.readouterr()
    assert run("doctor", model) == 0
    said = capsys.readouterr().out
    for words in ("Qwen2ForCausalLM", "context +4,096 tokens", "float32", "answers end with +<eos>", "GB of weights", "KiB a token"):
        assert re.search(words, said), (words, said)
    for kind, status, words in (
        ("gemma2", 0, "2 layers: windows of 8, soft caps"),
        ("qwen3_5_text", 1, "engine +refused: Qwen3_5ForCausalLM .*keep a state"),
    ):
        folder = tmp_path / kind
        build(kind).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        assert run("doctor", folder) == status
        assert re.search(words, capsys.readouterr().out)
    assert "no model folder" in fails(capsys, "doctor", tmp_path / "nowhere/at/all")


# bad input: each is refused with one sentence, before any work


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stepz=3"], ["no field 'stepz'", "Did you mean steps?"]),
        (["branching.widht=3"], ["no field 'widht'", "Did you mean branching.width?"]),
        (["steps=three"], ["steps=three", "'three' is not a whole number"]),
        (["top_p=high"], ["'high' is not a number"]),
        (["tensorboard=perhaps"], ["true or false"]),
        (["branching.width=1"], ["branching.width=1", "width 1", "branching factor 2"]),
        (["steps=0"], ["steps must be at least 1, got 0"]),
        (["temperature=0"], ["temperature must be above 0 while training, got 0"]),
        (["tokens_per_batch=20"], ["tokens_per_batch=20 cannot hold one path", "16 + 12"]),
        (["optimizer.lr=-1"], ["optimizer.lr must be at least 0"]),
        (["prompt_limit=4"], ["tokens, the limit is 4"]),
        (["device=tpu9"], ["device=tpu9"]),
        (["response_limit=1020", "tokens_per_batch=2000"], ["response_limit is 1020, but the model ends at 1024"]),
        (["demonstrations=1", "tasks.per_problem=0"], ["no task has one"]),
        (["model=nowhere/at/all/model"], ["there is no model folder nowhere/at/all/model"]),
        (["steps"], ["'steps' is no override"]),
        (["model=runs/quickstart/1-sft"], ["there is no run at runs/quickstart/1-sft", "run `make quickstart` first"]),
        (["model=runs/mine"], ["there is no run at runs/mine", "train it first"]),
        (["branching=none"], ["branching cannot be None"]),
        (["answer=5"], ["answer is an object or None, got 5", "answer=true"]),
        (["top_p=2"], ["top_p must be in (0, 1], got 2.0"]),
        (["optimizer.betas=2,3"], ["optimizer.betas must be in [0, 1)", "(2.0, 3.0)"]),
        (["threads=0"], ["threads must be at least 1"]),
    ],
)
def test_bad_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
):
    monkeypatch.chdir(tmp_path)  # where no quickstart has been run
    said = fails(capsys, "train", RECIPE, f"out={tmp_path / 'run'}", *words)
    for part in parts:
        assert part in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "Did you mean quickstart?" in fails(capsys, "train", "quickstrat")
    assert "there is no recipe at" in fails(capsys, "train", tmp_path / "mine.py")
    (tmp_path / "empty.py").write_text("x = 1")
    assert "has no function recipe()" in fails(capsys, "train", tmp_path / "empty.py")
    for name in ("smal", "SMALL", "replace"):  # not there, no function, a function of somebody else's
        said = fails(capsys, "train", f"grpo:{name}")
        assert f"grpo has no function {name}()" in said
        assert "there is grpo, grpo:small" in said
    (tmp_path / "several.py").write_text("def one(): ...\ndef two(n=1): ...\ndef three(n): ...\ndef _four(): ...\n")
    said = fails(capsys, "train", f"{tmp_path / 'several.py'}:three")
    assert said.endswith("several.py:one, " + str(tmp_path / "several.py") + ":two\n")
    (tmp_path / "odd.py").write_text("def recipe():\n    return 3")
    assert "must return a Run or a tuple of Runs, got 3" in fails(capsys, "train", tmp_path / "odd.py")


def test_variants_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from ramulus.run.config.resume import build

    assert run("recipes") == 0
    said = capsys.readouterr().out
    for name in ("grpo", "dapo", "treepo"):
        assert f"{name}:small" in said
        stages, folder = build(f"{name}:small", [])
        assert stages[0].model.path == "runs/quickstart/1-sft"
        assert folder == Path("runs") / name
    assert "quickstart:" not in said
    monkeypatch.chdir(HERE)
    (out,) = words = [f"out={tmp_path / 'run'}"]
    assert run("train", "run_recipe.py:stages", out, "sft.steps=2", "rl.steps=1") == 0
    assert (tmp_path / "run" / "2-rl" / "evaluation-after.json").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == f"{RECIPE}:stages"
    monkeypatch.chdir(tmp_path)
    assert "not of" in fails(capsys, "train", RECIPE, *words, "--resume")
    assert run("train", f"{RECIPE}:stages", *words, "rl.steps=2", "--resume") == 0
    said = capsys.readouterr().out
    assert "rl: going on after step 1 of 2" in said
    assert re.search(r"rl: samples by (compiled kernels|torch's operations) in float32", said)


def test_a_run_is_a_model(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    from safetensors.torch import load_file

    out = tmp_path / "next"
    assert run("train", RECIPE, f"model={trained}", f"out={out}", "steps=1", "optimizer.lr=1e-30") == 0
    first, second = (
        load_file(run / "checkpoints" / "step-000001" / "model" / "model.safetensors") for run in (trained, out)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    said = fails(capsys, "train", RECIPE, f"model={tmp_path / 'empty'}", f"out={out}", "--fresh")
    assert "has no checkpoint yet" in said
    model = tmp_path / "a model"
    shutil.copytree(trained / "checkpoints" / "step-000001" / "model", model)
    (model / "checkpoints").mkdir()  # such as a model of one's own may have
    assert run("train", RECIPE, f"model={model}", f"out={tmp_path / 'third'}", "steps=1") == 0
    assert model_path(str(model)) == str(model)
    assert trained_by(str(model)) is None
    (model / "metrics.jsonl").touch()
    assert model_path(str(model)) == str(model)
    out = tmp_path / "third"
    (out / "converted.gguf").touch()  # a run stays one, whatever else lies there
    assert model_path(str(out)) == str(out / "checkpoints" / "step-000001" / "model")
    (tmp_path / "files" / "checkpoints").mkdir(parents=True)
    (tmp_path / "files" / "one.gguf").touch()
    assert model_path(str(tmp_path / "files")) == str(tmp_path / "files")
    assert "is a file" in fails(capsys, "eval", trained / "run.json", "--tasks", "chain")


def grpo(out: Path, model: Path, problems: Path, *words: str) -> list[str]:
    """The shipped recipe, made small."""
    small = [
        "prompt_limit=64",
        "response_limit=8",
        "tokens_per_batch=512",
        "schedule.prompts=2",
        "branching.n=2",
        "steps=2",
    ]
    small += ["threads=1", "autocast=false", "activation_checkpointing=false", "engine.slots=4", "tensorboard=false", "engine.precision=float32"]
    return ["train", "grpo", f"out={out}", f"model={model}", f"tasks.path={problems}", *small, *words]


def test_bad_problem_files(tmp_path: Path, model: Path, problems: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert "nosuch.jsonl" in fails(capsys, *grpo(out, model, tmp_path / "nosuch.jsonl"))
    said = fails(capsys, *grpo(out, model, problems, "tasks.prompt=question"))
    assert "no column 'question'" in said
    assert "problem, answer" in said
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"problem": " ", "answer": "1"}\n')
    assert "empty prompt" in fails(capsys, *grpo(out, model, empty))


def test_bad_models(tmp_path: Path, model: Path, problems: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "model.safetensors").unlink()
    assert "holds no weights" in fails(capsys, *grpo(out, bare, problems))
    endless = tmp_path / "endless"
    shutil.copytree(model, endless)
    config = endless / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"eos_token": None}))
    assert "has no EOS token" in fails(capsys, *grpo(out, endless, problems))
    assert "has no EOS token" in fails(capsys, "eval", endless, "--tasks", problems)
    config.write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    said = fails(capsys, *grpo(out, endless, problems))
    assert "'<|endoftext|>' with id 103, but the model has 103 tokens" in said


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return float('nan')", ["'broken'", "nan", "finite number"]),
        ("raise RuntimeError('no scorer')", ["'broken'", "RuntimeError: no scorer"]),
        ("return 'good'", ["'broken'", "'good'"]),
    ],
)
def test_a_broken_reward_is_found_before_anything_is_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, parts: list[str]
):
    recipe = f"from dataclasses import replace\nfrom ramulus.run.config.find import find\n\n\ndef broken(task, path):\n    {body}\n\n\n"
    recipe += f"def recipe():\n    return replace(find({RECIPE!r}).rl(), rewards=broken)\n"
    (tmp_path / "broken.py").write_text(recipe)
    said = fails(capsys, "train", tmp_path / "broken.py", f"out={tmp_path / 'run'}")
    for part in parts:
        assert part in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("no folder")
    said = fails(capsys, "train", RECIPE, f"out={tmp_path / 'file' / 'run'}")
    assert "cannot write in the folder" in said
    assert "out=FOLDER" in said


def test_debug_shows_where(tmp_path: Path):
    with pytest.raises(ValueError, match="no field 'stepz'"):
        main(["train", RECIPE, "stepz=1", f"out={tmp_path}", "--debug"])


# what works


def test_shipped_grpo_on_a_file_of_problems(
    tmp_path: Path, model: Path, problems: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert run(*grpo(out, model, problems)) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert f"ramulus eval {out}" in capsys.readouterr().out.replace("\n", "")


def test_eval_writes_every_answer(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "result.json"
    words = ["--tasks", "chain", "--limit", "3", "--samples", "4", "--k", "3", "--max-tokens", "8"]
    command = ("eval", trained, *words, "--out", out, "--slots", "8")
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "chain: 3 problems" in said
    found = json.loads(out.read_text())["tasks"]["chain"]
    assert {"mean@4", "pass@3", "greedy", "length", "truncated"} <= found.keys()
    assert [len(row["sampled"]) for row in found["answers"]] == [4, 4, 4]
    assert run(*command[:-3], tmp_path / "again.json", "--slots", "8") == 0
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(out.read_text())


def test_eval_of_what_is_not_there(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    assert "nosuch.jsonl" in fails(capsys, "eval", model, "--tasks", tmp_path / "nosuch.jsonl")
    assert "there is no model folder" in fails(capsys, "eval", tmp_path / "nosuch" / "model", "--tasks", "chain")
    assert "--limit" in fails(capsys, "eval", model, "--tasks", "chain", "--limit", "0")
    said = fails(capsys, "eval", model, "--tasks", "chain", "--max-tokens", "5000")
    assert "5000 are wanted for a response, but the model ends at 4096" in said
    assert "pass@9" in fails(capsys, "eval", model, "--tasks", "chain", "--limit", "2", "--samples", "4", "--k", "9")


def test_what_a_run_says_to_type_next_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A short context: the longest response is what the model has room for, not the usual 1024."""
    out = tmp_path / "run"
    capsys.readouterr()
    assert run("train", RECIPE, f"out={out}", "steps=1", "model.max_positions=48", "evals=none") == 0
    said = capsys.readouterr().out
    commands = [line.split("#")[0].split()[1:] for line in said.splitlines() if line.startswith("  ramulus ")]
    assert [words[0] for words in commands] == ["view", "rollout", "eval", "export"]
    assert commands[0][1:] == [str(out)]  # it serves until it is ended: tests/test_viewer*.py
    assert commands[1][-2:] == ["--segment", "4"]
    assert run(*commands[1]) == 0
    assert run(*commands[2], "--limit", "2") == 0
    assert run(*commands[3][:-1], tmp_path / "model") == 0


def test_columns_of_files_are_named_and_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "other.csv"
    path.write_text("question,solution\nWhat is 1 + 1?,2\n")
    assert "no column 'problem': name one of question, solution" in fails(capsys, "eval", model, "--tasks", path)
    columns = ("--prompt", "question", "--answer", "solution")
    assert run("eval", model, "--tasks", path, *columns, "--max-tokens", "4", "--samples", "1") == 0
    assert run("rollout", model, "--tasks", path, *columns, "--segment", "2", "--depth", "2") == 0
    assert run(*grpo(tmp_path / "run", model, path, "tasks.prompt=question", "tasks.answer=solution", "steps=1")) == 0
    assert f"--tasks {path} --prompt question --answer solution" in capsys.readouterr().out


def test_rollout_shows_and_saves_trees(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    words = ("rollout", trained, "--tasks", "chain", "--width", "4", "--depth", "2", "--segment", "6", "--slots", "8")
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "1 tree, 4 paths" in said
    assert "tokens sampled" in said
    assert "reward 0" in said
    assert run(*words, "--out", tmp_path / "trees.jsonl", "--limit", "2", "--star") == 0
    from ramulus.core import store

    trees = list(store.read(tmp_path / "trees.jsonl"))
    assert len(trees) == 2
    assert all(len(tree.leaves()) == 4 for tree in trees)


def test_export_is_a_plain_model_folder(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("export", trained, tmp_path / "model") == 0
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("4+7=11").input_ids) == "4+7=11"
    assert net.config.hidden_size == 16
    assert "already and not empty" in fails(capsys, "export", trained, tmp_path / "model")
    assert "there is no run at" in fails(capsys, "export", tmp_path / "nosuch", tmp_path / "other")
    assert run("export", trained, tmp_path / "best", "--which", "best") == 0


VERL = '''"""Shipped GRPO with a reward of one's own beside the verifier."""

from dataclasses import replace

from ramulus.recipes import grpo
from ramulus.run.config.recipe import Weighted
from ramulus.tasks.math import Boxed


def letters(task, path):
    return sum(c.isalpha() for c in path.text) / 16


def recipe():
    return replace(grpo.recipe(), name="verl", rewards=(Weighted(Boxed()), Weighted(letters, 0.5)))
'''


@pytest.mark.skipif(not (DATA / "verl").is_dir(), reason="needs the benchmarks in ../shared/data")
@pytest.mark.filterwarnings("ignore:left out")
def test_two_steps_on_verl_columns_then_math_500(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.py").write_text(VERL)
    words = grpo(tmp_path / "run", model, DATA / "verl" / "dapo_math_train.parquet", "tasks.limit=12", "on_long=drop")
    words[1] = str(tmp_path / "mine.py")
    assert run(*words, "prompt_limit=400", "response_limit=16", "branching.n=4", "optimizer.lr=0.01") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["trained"] > 0 and line["mismatch_max"] < 1e-4 for line in lines)
    result = tmp_path / "math500.json"
    words = ("--tasks", DATA / "math" / "math500.jsonl", "--samples", "2", "--limit", "4", "--max-tokens", "16")
    assert run("eval", tmp_path / "run", *words, "--out", result) == 0
    (found,) = json.loads(result.read_text())["tasks"].values()
    assert found["problems"] == 4
    assert found["mean@2"] == 0.0
    assert "math500" in capsys.readouterr().out
