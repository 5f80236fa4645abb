"""Runs of models with chat templates: resumed after midnight, refused in one sentence, told when no answer ends by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.cli import main
from ramulus.core.store import read
from ramulus.run.config import resume
from ramulus.run.launch import launch

RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import dataclass, replace
from run_recipe import rl
from ramulus import Scratch

@dataclass(frozen=True)
class Chatty(Scratch):
    template: str = ""

    def __call__(self):
        model, tokenizer = super().__call__()
        tokenizer.chat_template = self.template
        return model, tokenizer

def recipe():
    run = rl()
    start = Chatty(run.model.alphabet + "abcdefghijklmnopqrstuvwxyz -", run.model.hidden, run.model.layers, template={template!r})
    return replace(run, model=start, prompt_limit=128, tokens_per_batch=4096, steps=1)
"""
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def recipe_at(folder: Path, template: str) -> str:
    path = folder / "mine.py"
    path.write_text(RECIPE.format(tests=str(Path(__file__).parent), template=template))
    return str(path)


def train(recipe: str, *words: str, again: bool = False) -> None:
    assert launch(recipe, list(words), again, False, Console(quiet=True)) == 0


def prompts(run: Path, step: int) -> set[str]:
    """How the prompts of a step begin, by the ids of their first five tokens."""
    return {str(tuple(tree.task.prompt[:5])) for tree in read(run / "trees" / f"{step:06}.jsonl")}


def test_a_run_goes_on_after_midnight_with_the_date_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = recipe_at(tmp_path, "{{ strftime_now('%d-%m') }} " + PLAIN), tmp_path / "run"
    monkeypatch.setattr(resume, "today", lambda: "2026-03-31")
    train(recipe, f"out={run}")
    assert json.loads((run / "run.json").read_text())["date"] == "2026-03-31"
    monkeypatch.setattr(resume, "today", lambda: "2026-04-01")
    train(recipe, f"out={run}", "steps=2", again=True)
    assert prompts(run, 1) == prompts(run, 2)
    assert len(prompts(run, 1)) == 1
    train(recipe, f"out={tmp_path / 'other'}")
    assert prompts(tmp_path / "other", 1) != prompts(run, 1)
    train(recipe, f"out={tmp_path / 'told'}", "date=2026-03-31")
    assert prompts(tmp_path / "told", 1) == prompts(run, 1)
    with pytest.raises(ValueError, match="date was '2026-03-31', is now '2026-03-30'"):
        train(recipe, f"out={tmp_path / 'told'}", "date=2026-03-30", again=True)


@pytest.mark.parametrize(
    ("template", "words", "said"),
    [
        ("{{ raise_exception('no such roles') }}", [], "refuses the chat of problem"),
        ("{% for m in messages %}{{ m.content }}", [], "has an error in line 1"),
        (PLAIN, ["template_arguments.enable_thinking=false"], "template_arguments has 'enable_thinking', which the chat template"),
        (PLAIN, ["date=tomorrow"], "date='tomorrow' is no day"),
    ],
)
def test_what_a_template_refuses_ends_a_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", recipe_at(tmp_path, template), f"out={tmp_path / 'run'}", *words])
    shown = " ".join("".join(capsys.readouterr()).split())
    assert ended.value.code == 2
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", recipe_at(tmp_path, PLAIN), f"out={tmp_path / 'run'}", "response_limit=1", "steps=4"])
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("and did not end by themselves: raise it, or look whether this model ends its turns with") == 1
