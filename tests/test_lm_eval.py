"""Tasks of lm-evaluation-harness through `ramulus eval`: the same numbers as by lm_eval itself, on a task of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ramulus.run.evaluation.loaded_model import load_model
from test_cli import fails, run
from test_eval_run import LETTERS, built

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{rest}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
KINDS = {
    "generate_until": {
        "target": "{{answer}}", "metric": "exact_match",
        "rest": "generation_kwargs:\n  until: ['7']\n  do_sample: false\n  max_gen_toks: 12",
    },
    "multiple_choice": {"target": "0", "metric": "acc", "rest": "doc_to_choice: ['{{answer}}', '0', '12']"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("model") / "tiny", LETTERS)


def task(folder: Path, kind: str, answers: list[str]) -> Path:
    """A task of as many problems as answers."""
    rows = [{"question": f"{i}+{2 * i}=", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(TASK.format(data=folder / "rows.jsonl", kind=kind, **KINDS[kind]))
    return folder / "letters.yaml"


def own(model: Path, file: Path) -> dict[str, Any]:
    """lm_eval's results, by its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_model(str(model), "cpu", 1, 4)
    its = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, device="cpu")
    found = simple_evaluate(its, tasks=["letters"], task_manager=TaskManager(include_path=str(file.parent)))
    return {"numbers": found["results"]["letters"], "answers": [sample["resps"][0][0] for sample in found["samples"]["letters"]]}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_lm_eval_itself(kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    file = task(tmp_path, kind, ["1"] * 8)
    if kind == "generate_until":  # half of the problems ask for what the model says
        said = own(model, file)["answers"]
        assert len(set(said)) > 1
        file = task(tmp_path, kind, [text if i % 2 else "no" for i, text in enumerate(said)])
    wanted = own(model, file)["numbers"]
    out = tmp_path / "found.json"
    assert run("eval", model, "--tasks", f"lm_eval:{file}", "--out", out, "--threads", 1) == 0
    metric = KINDS[kind]["metric"]
    numbers = json.loads(out.read_text())["results"]["letters"]
    assert numbers == pytest.approx({name: value for name, value in wanted.items() if name in numbers} | {"alias": numbers["alias"]}, abs=1e-12)
    assert f"{wanted[f'{metric},none']:.4f}" in capsys.readouterr().out
    if kind == "generate_until":
        assert wanted["exact_match,none"] >= 0.5


def test_what_cannot_be_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    assert "knows no task 'no_such_task'" in fails(capsys, "eval", model, "--tasks", "lm_eval:no_such_task")
    assert "there is no file" in fails(capsys, "eval", model, "--tasks", f"lm_eval:{tmp_path}/none.yaml")
    assert "one after the other" in fails(capsys, "eval", model, "--tasks", "lm_eval:gsm8k", "chain")


def test_without_the_package(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "pip install 'ramulus[lm_eval]'" in fails(capsys, "eval", model, "--tasks", "lm_eval:gsm8k")
