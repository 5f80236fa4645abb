"""What stands for problems on the command line is what a run names in its last lines."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ramulus.run.config.words import problems, problems_word
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
