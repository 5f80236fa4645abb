"""What stands for problems and segments on the command line is what a run names in its last lines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ramulus.grow.branching import Star
from ramulus.grow.demonstration import Hinted
from ramulus.grow.segments import Segments
from ramulus.run.config.describe import is_bare, recipe_text, to_json
from ramulus.run.config.find import stages_of
from ramulus.run.config.resume import build, prepare
from ramulus.run.config.weighted import Weighted
from ramulus.run.config.words import problems, problems_word, reward_word
from ramulus.run.launch import segment_word
from ramulus.tasks.chain import ChainAnswer
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed
from ramulus.tasks.rewards import Overlong
from ramulus.tasks.sums import Sums


@pytest.mark.parametrize("word", ["chain", "sums", "word_problems", "gym:countdown", "mine.jsonl"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_source_is_named_by_the_word_that_it_is_read_from(word: str, split: str):
    assert problems_word(problems(word, split).make("tasks")) == word


def test_a_source_of_ones_own_is_not_taken_for_a_shipped_one_of_its_name():
    @dataclass(frozen=True)
    class Gym:
        path: str = "elsewhere"

    @dataclass(frozen=True)
    class Harder(Sums):
        more: int = 1

    @dataclass(frozen=True)
    class Mine(File):
        more: int = 1

    assert problems_word(Gym()) == "FILE"
    assert problems_word(lambda tokenizer: []) == "FILE"
    assert problems_word(Harder(3)) == "sums"
    assert problems_word(Mine("a b.jsonl")) == "a b.jsonl"


def test_out_in_the_home_folder_is_one_folder_for_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for recipe in (str(Path(__file__).with_name("run_stages.py")), str(Path(__file__).with_name("run_recipe.py"))):
        stages, top = build(recipe, ["out=~/mine"])
        assert top == tmp_path / "mine"
        assert all(stage.folder.is_relative_to(top) for stage in stages)


class Always:
    def __call__(self, task: Any, path: Any) -> float:
        return 1.0


class Counting(Always):
    def __init__(self) -> None:
        self.calls = 0


def test_an_object_of_a_class_without_fields_stands_in_a_recipe_and_another_is_refused_before_any_work():
    (run,) = stages_of(str(Path(__file__).with_name("run_recipe.py")))
    ((kept,), _) = build((replace(run, rewards=Always()),), [])
    assert to_json(kept)["rewards"] == {"class": "test_words.Always"}
    assert "rewards=Always()," in recipe_text(kept)
    assert "from test_words import Always" in recipe_text(kept)
    assert not any(is_bare(thing) for thing in (torch.ones(3), np.ones(3), Counting(), object(), 3, "a", [], SimpleNamespace()))
    for reward, path in ((Counting(), "rewards"), ((Weighted(Counting()),), "rewards.0.reward")):
        with pytest.raises(ValueError, match=rf"^{path}: Counting cannot stand in a recipe: make it a frozen dataclass"):
            build((replace(run, rewards=reward),), [])


def test_a_resume_is_laid_over_what_the_run_began_with_before_it_is_built(tmp_path: Path):
    recipe, out, held = str(Path(__file__).with_name("run_recipe.py")), f"out={tmp_path / 'run'}", tmp_path / "held.jsonl"
    plan = prepare(recipe, [out, f"evals={held}"])
    plan.save()
    plan.held.close()
    with pytest.raises(ValueError, match="ChainSum has no field 'prompt'"):
        prepare(recipe, [f"out={tmp_path / 'other'}", "evals.prompt=question"], resume=True)
    again = prepare(recipe, [out, "evals.prompt=question"], resume=True)
    again.held.close()
    assert again.stages[0].evals == File(str(held), prompt="question")


def test_segments_are_those_of_the_rule_inside():
    @dataclass(frozen=True)
    class Longer:
        length: int = 7

    rules = {Segments(4, 2, 16): " --segment 16", Hinted(Segments(4, 2, 16)): " --segment 16", Star(4): "", Longer(): ""}
    assert {rule: segment_word(SimpleNamespace(branching=rule)) for rule in rules} == rules  # type: ignore[arg-type]


def test_the_word_of_a_reward_is_that_of_the_usual_one():
    assert [reward_word(one) for one in (Boxed(), ChainAnswer())] == ["Boxed", "ChainAnswer"]
    assert {reward_word(one) for one in (Boxed(wrong=-1.0), (), Boxed, Overlong(8, 4), lambda task, path: 1)} == {"FILE.py:NAME"}
