"""The quickstart's task: splits that cannot overlap, teachers that are right or wrong as described, a strict verifier."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from statistics import fmean

import pytest

from ramulus.core.task import Path, Task
from ramulus.tasks.chain import ChainAnswer, ChainSum, ForgetsCarry, Right
from ramulus.tasks.problem import Problem

ALWAYS = ForgetsCarry(1.0)


def value(text: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d", text))


def test_problems_are_unique_right_and_repeatable() -> None:
    source = ChainSum(2000, seed=3)
    problems = source()
    assert problems == source()
    assert problems != replace(source, seed=4)()
    assert len({p.id for p in problems}) == len({p.text for p in problems}) == 2000
    for problem in problems:
        assert re.fullmatch(r"[1-9]([+-][1-9]){2,5}\?", problem.text)
        assert int(problem.answer) == value(problem.text)
    assert {len(re.findall(r"\d", p.text)) for p in problems} == {3, 4, 5, 6}


@pytest.mark.parametrize("terms", [(2, 2), (3, 3), (3, 6)])
def test_splits_are_disjoint_for_any_size_and_seed(terms: tuple[int, int]) -> None:
    train: set[str] = set()
    test: set[str] = set()
    for seed, count in ((0, 20), (1, 100)):
        train |= {p.text for p in ChainSum(count, "train", terms, seed=seed)()}
        test |= {p.text for p in ChainSum(count // 5, "test", terms, seed=seed + 7)()}
    assert train
    assert test
    assert not train & test


def test_a_small_space_is_used_up_and_no_further() -> None:
    everything = 9 * 18  # of two terms
    sizes = {}
    for split in ("train", "test"):
        with pytest.raises(
            ValueError, match=f"only (\\d+) {split} problems of 2 to 2 terms exist, 1000 were asked"
        ) as error:
            ChainSum(1000, split, (2, 2))()
        sizes[split] = int(re.search(r"only (\d+)", str(error.value))[1])  # type: ignore[index]
        assert len(ChainSum(sizes[split], split, (2, 2))()) == sizes[split]
    assert sum(sizes.values()) == everything
    with pytest.raises(ValueError, match="ask for at most"):
        ChainSum(10**7)()


@pytest.mark.parametrize(
    ("terms", "sums"),
    [
        ([8, 7], [5]),  # 15 without its carry
        ([9, 9, 7], [8, 5]),  # and on from the wrong sum: 8+7=15 is written 5
        ([9, 1], [0]),
        ([3, -7], [6]),  # borrowed from nothing
        ([4, -4, -8], [0, 2]),  # -8 without its borrow
        ([4, 5, -9], [9, 0]),  # no ten is crossed
        ([1, 2, 3], [3, 6]),
    ],
)
def test_the_habit_keeps_the_tens_and_the_right_last_digit(terms: list[int], sums: list[int]) -> None:
    assert ALWAYS(terms, random.Random(0)) == sums


def test_the_habit_from_any_sum() -> None:
    for before in range(-30, 40):
        for term in [*range(-9, 0), *range(1, 10)]:
            after = before + term
            (written,) = ALWAYS([before, term], random.Random(0))
            assert written % 10 == after % 10
            assert written // 10 == before // 10, "the tens of the sum before"
            assert (written == after) == (before // 10 == after // 10)
            assert Right()([before, term], random.Random(0)) == [after]


def test_the_habit_strikes_in_its_share_of_the_crossings() -> None:
    crossings = wrong = 0
    for problem in ChainSum(3000, teacher=ForgetsCarry(0.6))():
        for line in problem.demonstrations[0].split("\n")[:-1]:
            before, term, after = (int(n) for n in re.fullmatch(r"(-?\d+)([+-]\d)=(-?\d+)", line).groups())  # type: ignore[union-attr]
            if before // 10 == (before + term) // 10:
                assert after == before + term
            else:
                crossings += 1
                wrong += after != before + term
    assert abs(wrong / crossings - 0.6) < 0.03


def accuracy(problems: list[Problem]) -> float:
    """Share of the demonstrations whose answer is right."""
    return fmean(shown.endswith(f"\n={problem.answer}") for problem in problems for shown in problem.demonstrations)


def test_teachers_accuracies() -> None:
    source = ChainSum(3000, terms=(3, 6))
    assert accuracy(source()) == 1.0
    assert 0.39 < accuracy(replace(source, teacher=ForgetsCarry(0.6))()) < 0.48


def test_demonstrations() -> None:
    source = ChainSum(500, per_problem=3, teacher=ForgetsCarry(0.6))
    problems = source()
    assert all(len(p.demonstrations) == 3 for p in problems)
    assert any(len(set(p.demonstrations)) > 1 for p in problems), "each demonstration is drawn anew"
    right = ChainSum(500)()
    for problem in right:
        first, *rest = re.findall(r"[+-]?\d", problem.text)
        sums = [value(first + "".join(rest[:i])) for i in range(len(rest) + 1)]
        lines = [f"{a}{term}={b}" for a, term, b in zip(sums, rest, sums[1:])]
        assert problem.demonstrations == ("\n".join([*lines, f"={sums[-1]}"]),)
    assert 22 < sum(len(p.demonstrations[0]) + 1 for p in right) / 500 < 32
    for problem in problems + right:
        assert set(problem.text + "".join(problem.demonstrations)) <= set(source.alphabet)


def graded(text: str, answer: str = "7", finish: str | None = "eos") -> dict[str, object]:
    return ChainAnswer()(Task("t", (), "?", answer), Path(text, (1, 2), finish))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3+4=7\n=7", True),
        ("=7", True),
        ("=7\n", True),
        ("nonsense\n=7", True),
        ("3+4=7", False),
        ("=7\n\n", False),
        ("=07", False),
        ("= 7", False),
        ("=+7", False),
        ("=7.0", False),
        ("==7", False),
        ("=8\n=7 ", False),
        ("7", False),
        ("=", False),
        ("", False),
        ("=-7", False),
        ("=7\n=8", False),
    ],
)
def test_only_the_last_line_counts_and_strictly(text: str, right: bool) -> None:
    verdict = graded(text)
    assert verdict["reward"] == verdict["correct"] == float(right)


def test_no_reward_for_a_number_cut_short_or_an_empty_reference() -> None:
    assert graded("=7", finish="length")["correct"] == 0
    assert graded("=", answer="")["correct"] == 0
    assert graded("=-12", answer="-12")["correct"] == 1
    assert ChainAnswer(wrong=-1.0)(Task("t", (), "", "1"), Path("=2", (), "eos"))["reward"] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "got 'dev'"),
        ({"terms": (5, 3)}, r"got \(5, 3\)"),
        ({"terms": (1, 3)}, "2 <= fewest"),
        ({"count": 0}, "at least 1"),
        ({"per_problem": -1}, "at least 0"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChainSum(**{"count": 10, **options})  # type: ignore[arg-type]
