"""What stands for problems and segments on the command line is what a run names in its last lines."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from ramulus.grow.branching import Star
from ramulus.grow.demonstration import Hinted
from ramulus.grow.segments import Segments
from ramulus.run.config.words import problems, problems_word
from ramulus.run.launch import segment_word
from ramulus.tasks.files import File
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


def test_segments_are_those_of_the_rule_inside():
    @dataclass(frozen=True)
    class Longer:
        length: int = 7

    rules = {Segments(4, 2, 16): " --segment 16", Hinted(Segments(4, 2, 16)): " --segment 16", Star(4): "", Longer(): ""}
    assert {rule: segment_word(SimpleNamespace(branching=rule)) for rule in rules} == rules  # type: ignore[arg-type]
