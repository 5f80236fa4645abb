"""Statistics of an evaluation against enumeration, a public implementation and their own symmetries."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramulus.look.evaluation.measures import EQUAL_TOKENS, GREEDY, INDEPENDENT, TREE, Row, report_of, scores_of
from ramulus.look.evaluation.paired import against, compared, difference, tree_gains
from ramulus.look.evaluation.scoreboard import about_half, boards, note, overall, problems_csv, results_csv
from ramulus.look.evaluation.statistics import ballots, between, interval, interval_over, mean, pass_at_k, vote

PUBLIC = json.loads((Path(__file__).parent / "pass_at_k.json").read_text())

answers = st.lists(st.sampled_from(["", "1", "2", "3", "4"]), min_size=1, max_size=8)
values = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


def test_pass_at_k_is_that_of_a_public_implementation():
    assert len(PUBLIC["rows"]) > 500
    for n, c, k, expected in PUBLIC["rows"]:
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (n, c, k)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_by_enumeration(marks: list[bool], data: st.DataObject):
    k = data.draw(st.integers(1, len(marks)))
    drawn = list(itertools.combinations(marks, k))
    assert pass_at_k(len(marks), sum(marks), k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def elections(given: list[str], marks: list[float], k: int) -> tuple[float, float]:
    """The mean score and the share of ties over all draws of k attempts, counted one by one."""
    score = tie = number = 0.0
    for drawn in itertools.combinations(range(len(given)), k):
        number += 1
        votes = Counter(given[i] for i in drawn if given[i])
        winners = [name for name, count in votes.items() if count == max(votes.values())]
        worth = [mean([marks[i] for i, name in enumerate(given) if name == winner]) for winner in winners]
        score += mean(worth) if winners else 0.0
        tie += len(winners) > 1
    return score / number, tie / number


@given(answers, st.data())
def test_maj_at_k_by_enumeration(given: list[str], data: st.DataObject):
    marks = [float(data.draw(st.booleans())) if name == "2" else float(name == "1") for name in given]
    k = data.draw(st.integers(1, len(given)))
    assert vote(given, marks, k) == pytest.approx(elections(given, marks, k), abs=1e-12)


@given(answers, st.data())
def test_a_vote_does_not_depend_on_the_order(given: list[str], data: st.DataObject):
    k = data.draw(st.integers(1, len(given)))
    shuffled = data.draw(st.permutations(given))
    assert vote(given, [float(name == "1") for name in given], k) == vote(
        shuffled, [float(name == "1") for name in shuffled], k
    )


def test_votes_of_many_attempts_by_sampling():
    rng = random.Random(0)
    given = [str(int(rng.expovariate(0.4))) for _ in range(120)] + [""] * 8
    marks = [float(name == "0") for name in given]
    score, tie = vote(given, marks, 16)
    wins = ties = 0.0
    for _ in range(4000):
        votes = Counter(name for name in rng.sample(given, 16) if name)
        winners = [name for name, count in votes.items() if count == max(votes.values())]
        wins, ties = wins + ("0" in winners) / len(winners), ties + (len(winners) > 1)
    assert score == pytest.approx(wins / 4000, abs=0.03)
    assert tie == pytest.approx(ties / 4000, abs=0.03)
    assert vote(["1"] * 700 + ["2"] * 300, [1.0] * 700 + [0.0] * 300, 501)[0] == pytest.approx(1.0)


def test_a_single_vote_is_accuracy_and_two_equal_votes_tie():
    given, marks = ["1", "2", "3", "1"], [1.0, 0.0, 0.0, 1.0]
    assert vote(given, marks, 1) == pytest.approx((0.5, 0.0))
    assert vote(given, marks, 2)[1] == pytest.approx(5 / 6)


def test_what_counts_as_the_same_answer():
    def count(*texts: str) -> int:
        """How many different ballots there are."""
        return len(set(ballots(texts).values()) - {""})

    assert count("1/2", "0.5", "\\frac12", "$\\dfrac{1}{2}$", "\\boxed{.5}") == 1
    assert count("1,000", "1000", "10^3", "1000.0", "x=1000", "1000\\text{ m}") == 1
    assert count("(x+1)^2", "x^2+2x+1", "1, 2", "2,1", "\\{1,2\\}") == 2
    assert count("x+1", "X+1") == 2
    assert count("  ", "") == 0
    assert count("$") == 1
    assert count("((((" * 500, "x" * 300) == 2


def test_between_two_numbers_of_attempts():
    assert between(lambda k: pass_at_k(4, 1, k), 2) == 0.5
    assert between(lambda k: pass_at_k(4, 1, k), 2.5) == 0.625


@given(values, st.data())
def test_the_paired_interval_is_symmetric(this: list[float], data: st.DataObject):
    other = data.draw(st.lists(st.floats(-1, 1), min_size=len(this), max_size=len(this)))
    one, two = difference([this], [other]), difference([other], [this])
    assert one["difference"] == -two["difference"]
    assert one["interval"] == (-two["interval"][1], -two["interval"][0])
    assert one["within_noise"] == two["within_noise"]
    assert difference([this], [this])["interval"] == (0.0, 0.0)
    assert difference([this], [this])["within_noise"]


def test_pairing_sees_what_two_intervals_hide():
    """Hard and easy problems differ far more than the models do."""
    other = [0.1, 0.9] * 20
    this = [value + (0.05 if i % 10 else -0.01) for i, value in enumerate(other)]
    found = difference([this], [other])
    assert found["difference"] == pytest.approx(0.044)
    assert not found["within_noise"]
    assert interval(this)[0] < mean(other) < interval(this)[1]
    assert difference([[1.0]], [[0.0]])["within_noise"], "one problem tells nothing"


def test_a_single_problem_that_differs_is_noise():
    """The bootstrap alone would not say so: nearly nothing on all sides but one keeps its lower end above 0."""
    found = difference([[1.0] * 80], [[0.0] + [0.999] * 79])
    assert found["interval"][0] > 0
    assert found["within_noise"]
    assert not difference([[1.0] * 80], [[0.0] * 12 + [0.999] * 68])["within_noise"]
    assert not difference([[1.0] * 20, [0.5] * 20], [[0.9] * 20, [0.4] * 20])["within_noise"]


@pytest.mark.parametrize("problems", [30, 100, 1319])
@pytest.mark.parametrize("moved", [4, 5, 6])
def test_fewer_than_six_problems_that_changed_are_noise(problems: int, moved: int) -> None:
    found = difference([[1.0] * problems], [[0.0] * moved + [1.0] * (problems - moved)])
    assert found["within_noise"] == (moved < 6)
    assert difference([[1.0] * 2, [1.0] * 3], [[0.0] * 2, [0.0] * 3])["within_noise"]


def test_the_interval_over_sets_resamples_each_by_itself():
    first, second = [0.0, 1.0] * 15, [0.0, 0.5, 1.0] * 10
    low, high = interval_over([first, second])
    assert low < (mean(first) + mean(second)) / 2 < high
    error = math.sqrt((0.25 + 1 / 6) / 30) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert interval_over([first]) == interval(first)
    with pytest.raises(ValueError, match="at least one problem"):
        interval_over([first, []])


def attempt(answer: str, right: str = "1", tokens: int = 10, finish: str = "eos") -> dict:
    good = float(answer == right)
    return {
        "tokens": tokens,
        "finish": finish,
        "reward": good,
        "correct": good,
        "verdict": {"correct": good, "answer": answer},
    }


def row(name: str, sampled: str, tree: str = "", tree_tokens: int = 0, greedy: str = "") -> Row:
    """A problem whose answer is 1; every letter is an answer, a blank is none."""
    made: Row = {"id": name, "problem": f"problem {name}", "answer": "1"}
    for kind, letters in (("sampled", sampled), ("tree", tree), ("greedy", greedy)):
        if letters:
            made[kind] = [attempt(letter.strip()) for letter in letters]
    return made | ({"tree_tokens": tree_tokens} if tree else {})


def test_measures_by_hand():
    rows = [row("a", "1122", greedy="1"), row("b", "12 3", greedy="2")]
    rows[1]["sampled"][2]["finish"] = "length"
    found = report_of(scores_of(rows, [1, 2, 4]), rows)
    assert found["mean@4"] == found["pass@1"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found["pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert found["pass@4"] == 1.0
    assert found["maj@4"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["ties@4"] == 1.0
    assert found["greedy"] == 0.5
    assert found["unanswered"] == found["truncated"] == 1 / 8
    assert found["length"] == 10
    assert found["intervals"].keys() >= {
        "mean@4",
        "pass@2",
        "maj@2",
        "ties@4",
        "length",
        "truncated",
        "unanswered",
        "greedy",
    }


def test_a_tree_is_one_draw_and_pays_for_independent_attempts():
    rows = [row("a", "1222", "1112", 20), row("b", "2221", "3333", 25), row("c", "2222", "12", 1000)]
    scores = scores_of(rows, [2])
    assert scores.groups.keys() == {INDEPENDENT, TREE, EQUAL_TOKENS}
    tree, paid = scores.groups[TREE], scores.groups[EQUAL_TOKENS]
    assert not any(name in tree for name in ("pass@1", "pass@3", "maj@1")), "answers of one tree are no draws of it"
    assert tree["pass@2"] == [1.0, 0.0, 1.0]
    assert tree["tokens"] == [20.0, 25.0, 1000.0]
    assert paid["attempts"] == [2.0, 2.5, 4.0]
    assert paid["short"] == [0.0, 0.0, 1.0]
    assert paid["pass"] == pytest.approx([1 / 2, 5 / 8, 0.0])
    assert paid["maj"][0] == pytest.approx(elections(["1", "2", "2", "2"], [1, 0, 0, 0], 2)[0])


def test_gains_of_trees_at_equal_answers_and_equal_tokens():
    rows = [row(str(i), "1222", "1122", 20) for i in range(30)]
    gains = tree_gains([scores_of(rows, [4])])
    assert gains["at equal answers"]["mean"]["difference"] == 0.25
    assert gains["at equal answers"]["pass@4"]["difference"] == 0.0
    assert gains["at equal answers"]["pass@4"]["within_noise"]
    assert gains["at equal tokens"]["pass"]["difference"] == 0.5
    assert not gains["at equal tokens"]["pass"]["within_noise"]
    assert tree_gains([scores_of([row("a", "12")], [2])]) == {}


def test_two_evaluations_of_the_same_problems():
    this = [row(str(i), "1122", greedy="1") for i in range(25)]
    other = [row(str(i), "12", greedy="1" if i % 2 else "2") for i in reversed(range(30))]
    pair = against(this, other, [1, 2, 4])
    assert pair[0].ids == pair[1].ids == [str(i) for i in range(25)]
    found = compared([pair])
    assert found[INDEPENDENT]["mean"]["difference"] == 0.0
    assert "pass@4" not in found[INDEPENDENT], "two attempts cannot tell it"
    assert found[INDEPENDENT]["pass@2"]["difference"] == pytest.approx(5 / 6 - 1)
    assert found[GREEDY]["greedy"]["difference"] == pytest.approx(13 / 25)
    assert not found[GREEDY]["greedy"]["within_noise"]
    with pytest.raises(ValueError, match="no problem is in both"):
        against(this, [row("x", "1")], [1])
    with pytest.raises(ValueError, match="another problem there"):
        against(this, [row("3", "1") | {"problem": "something else"}], [1])


def test_tables_and_sheets_hold_what_was_found():
    from io import StringIO

    from rich.console import Console

    sets = [scores_of([row(f"{i}", "1122", "1122", 20, greedy="1") for i in range(n)], [1, 2]) for n in (30, 8)]
    console = Console(file=StringIO(), width=200)
    for table in boards(["one", "[red]two"], sets, "temperature 1", 200):
        console.print(table)
    assert len(boards(["one", "two"], sets, "", 60)) == 3, "one column each where there is no room"
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mean over sets" in said
    assert "mean@4 (avg@4)" in said
    assert "[red]two" in said
    assert "8 problems are few" in note(sets)
    assert note(sets[:1]) == ""
    assert about_half("mean@4", [sets[0].groups[INDEPENDENT]["mean@4"]]) == "50.0 ± 0.0"
    assert overall(sets)[INDEPENDENT]["mean@4"] == 0.5
    lines = results_csv(["one", "two"], sets, {"gain": tree_gains(sets)}).splitlines()
    assert "one,30,independent,mean@4,0.5,0.5,0.5," in lines
    assert any(line.startswith("mean over sets,38,greedy,greedy,1.0") for line in lines)
    assert any(line.startswith("gain,,at equal tokens,pass,") and line.endswith(("True", "False")) for line in lines)
    sheet = problems_csv(["one", "two"], sets).splitlines()
    assert len(sheet) == 39
    assert sheet[0].startswith("tasks,problem,independent: mean@4")
