"""One line of advice where a run goes wrong in a known way: each on a real run that goes wrong that way, and listed in the docs."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ramulus import Boxed, Overlong, Weighted
from ramulus.run.advice import FEW, PAGE, RULES, Advice, Facts, everything_truncated, field_of_extract
from ramulus.run.config.override import override
from ramulus.run.launch import launch
from run_astray import good
from run_recipe import rl

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "tests" / "run_astray.py")
NAMES = [rule.__name__ for rule in RULES]


def advised(name: str, out: Path, *words: str, resume: bool = False) -> list[tuple[str, str]]:
    """(rule, line) of each piece of advice that a run was given."""
    console = Console(file=io.StringIO(), width=400)
    assert launch(f"{RECIPE}:{name}", [f"out={out}", *words], resume, False, console) == 0
    said = console.file.getvalue().splitlines()
    return [(line.rsplit(", ", 1)[1].rstrip(")"), line) for line in said if f"({PAGE}, " in line]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_wrong_is_told_once(tmp_path: Path, name: str) -> None:
    found = [rule for rule, _ in advised(name, tmp_path / "run")]
    assert found.count(name) == 1, found


def test_a_run_that_goes_well_is_told_nothing(tmp_path: Path) -> None:
    assert advised("good", tmp_path / "run") == []


def test_a_resumed_run_is_not_told_again(tmp_path: Path) -> None:
    first = advised("no_group_mixed", tmp_path / "run", "steps=3")
    assert [rule for rule, _ in first] == ["no_group_mixed"]
    assert "in 3 steps no tree" in first[0][1]
    assert advised("no_group_mixed", tmp_path / "run", "steps=4", resume=True) == []


def test_the_docs_list_every_piece_of_advice() -> None:
    text = (ROOT / PAGE).read_text()
    assert [title for title in re.findall(r"^## .*\(`(\w+)`\)$", text, re.M) if title in NAMES] == NAMES


def test_advice_is_given_again_after_it_has_cleared() -> None:
    advice = Advice(Facts(rl(), 100))
    bad, fine = {"paths": 40, "truncated": 1.0}, {"paths": 400, "truncated": 0.0}
    assert len(advice(bad)) == 1
    assert [advice(row) for row in [bad, fine, bad, fine, bad]] == [[]] * 5, "said already, and not long enough gone"
    assert [advice(fine) for _ in range(2 * FEW)] == [[]] * (2 * FEW)
    (again,) = [text for _ in range(FEW) for text in advice(bad)]
    assert again.startswith("200 of 200 answers were cut off")


def test_metrics_of_a_long_run_are_not_kept() -> None:
    advice = Advice(Facts(good(), 100))
    for step in range(300):
        advice({"step": step, "paths": 0})
    assert [row["step"] for row in advice.rows] == [*range(10), *range(290, 300)]


@pytest.mark.parametrize(("paths", "truncated", "said"), [(19, 1.0, False), (20, 1.0, True), (20, 0.95, False), (400, 0.96, True)])
def test_one_answer_in_twenty_is_enough(paths: int, truncated: float, said: bool) -> None:
    text = everything_truncated([{"paths": paths, "truncated": truncated}], Facts(rl(), 100, ("<eos>", "<|im_end|>")))
    assert (text is not None) == said
    assert text is None or ("cut off at response_limit=12" in text and "<eos> or <|im_end|>" in text)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (Boxed(), " (rewards.extract=number)"),
        ((Boxed(),), " (rewards.0.extract=number)"),
        ((Weighted(Overlong(64, 16)), Weighted(Boxed())), " (rewards.1.reward.extract=number)"),
        (Overlong(64, 16), ""),
    ],
)
def test_the_field_that_looks_elsewhere_is_named_as_it_is_set(rewards: object, said: str) -> None:
    run = replace(rl(), rewards=rewards)
    assert field_of_extract(run) == said
    if said:
        (changed,) = override((run,), [said.strip(" ()")])
        assert "LastNumber" in repr(changed.rewards)
