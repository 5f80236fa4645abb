"""reasoning-gym tasks: problems by name, their own scorers in guarded workers, and answers that must not be run as code."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import sys
from typing import Any

import pytest

from ramulus.core.tagged_json import decode, encode
from ramulus.core.task import Path, Task
from ramulus.tasks.answers import LastBox, LastLine, Whole
from ramulus.tasks.arithmetic import worked
from ramulus.tasks.gym import FORMULA, LITERAL, Gym, GymScore, Scorer, encoded, unsafe
from ramulus.tasks.problem import Problem


def scored(problem: Problem, text: str, reward: GymScore | None = None) -> dict[str, Any]:
    task = Task(problem.id, (), problem.text, problem.answer, (), json.loads(json.dumps(problem.extra)))
    return asyncio.run((reward or GymScore())(task, Path(text, (1,), "eos")))


def test_problems_are_repeatable_and_split_by_range() -> None:
    source = Gym("chain_sum", 40, seed=5, config={"max_terms": 3})
    problems = source()
    assert problems == source()
    assert problems != Gym("chain_sum", 40, seed=6, config={"max_terms": 3})()
    later = Gym("chain_sum", 40, seed=5, config={"max_terms": 3}, start=40)()
    assert not {p.id for p in problems} & {p.id for p in later}
    both = Gym("chain_sum", 80, seed=5, config={"max_terms": 3})()
    assert [p.id for p in both if p.id in {q.id for q in later}] == [
        p.id for p in later if p.text in {q.text for q in both if q.id == p.id}
    ]
    assert all(json.loads(json.dumps(p.extra)) == p.extra for p in problems)


def test_repeated_texts_are_left_out() -> None:
    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    unique = Gym("chain_sum", 300, config=easy)()
    assert len({p.text for p in unique}) == len(unique) < 300
    assert len(Gym("chain_sum", 300, config=easy, unique=False)()) == 300


def test_scores_of_the_tasks_own_scorer() -> None:
    problem = Gym("chain_sum", 1)()[0]
    assert scored(problem, f"so <answer>{problem.answer}</answer>") == {
        "reward": 1.0,
        "correct": 1.0,
        "answer": problem.answer,
    }
    assert scored(problem, f"so <answer>{problem.answer}.0</answer>")["correct"] == 1, "chain_sum's scorer takes this"
    partial = scored(problem, f"<answer>it is {problem.answer}</answer>")
    assert 0 < partial["reward"] < 1
    assert partial["correct"] == 0
    assert scored(problem, problem.answer)["reason"] == "no answer found"
    assert scored(problem, f"hm\n{problem.answer}", GymScore(LastLine()))["correct"] == 1
    assert scored(problem, rf"\boxed{{{problem.answer}}}", GymScore(LastBox()))["correct"] == 1


@pytest.mark.parametrize(
    "name", ["gcd", "countdown", "graph_color", "knights_knaves", "simple_integration", "sudoku", "rush_hour"]
)
def test_metadata_survives_json(name: str) -> None:
    problem = Gym(name, 1, seed=2)()[0]
    extra = json.loads(json.dumps(problem.extra))["gym"]
    assert extra["entry"] is not None
    from reasoning_gym import create_dataset

    entry = create_dataset(name, seed=2, size=1)[0]
    assert decode(extra["entry"]) == entry
    if problem.answer:
        assert Scorer(name)(extra, problem.answer) == 1.0
        assert Scorer(name)({**extra, "entry": None}, problem.answer) == 1.0, "drawn again from its seed"


def test_entries_are_plain_json_and_those_of_before_are_read() -> None:
    value = {"a": (1, 2.5, None, True), "b": {1: "x", (2, 3): {4}}, "!tuple": [1], "$set": ['{"!set": 1}'], "c": [{"d": frozenset({"e"})}]}
    assert decode(json.loads(json.dumps(encode(value)))) == value
    former = {"a": {"!tuple": [1, 2]}, "b": {"!items": [[1, {"!set": [4]}], ["!tuple", "{\"!set\": [1]}"]]}}
    assert decode(former) == {"a": (1, 2), "b": {1: {4}, "!tuple": '{"!set": [1]}'}}
    assert encoded({"a": object()}) is None
    assert encoded({"a": [1j]}) is None


def test_a_problem_without_reference_is_scored_by_its_metadata() -> None:
    problem = Gym("graph_color", 1, seed=1)()[0]
    assert problem.answer == ""
    entry = decode(problem.extra["gym"]["entry"])
    possible = json.dumps(entry["metadata"]["possible_answer"])
    assert scored(problem, f"<answer>{possible}</answer>")["correct"] == 1
    assert scored(problem, "<answer>{}</answer>")["correct"] == 0


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic"])
def test_demonstrations_are_right_and_score_full(name: str) -> None:
    problems = Gym(name, 200, seed=4, per_problem=1)()
    for problem in problems:
        *lines, last = problem.demonstrations[0].split("\n")
        assert last == f"<answer>{problem.answer}</answer>"
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left.replace("/", "//")) == int(right)
    assert scored(problems[0], problems[0].demonstrations[0])["correct"] == 1


def test_worked_solutions() -> None:
    assert worked("2 + 3 * (4 - -1)", "17") == "4 - (-1) = 5\n3 * 5 = 15\n2 + 15 = 17\n<answer>17</answer>"
    assert worked("-(3 - 5) / 2", "1").startswith("3 - 5 = -2\n2 / 2 = 1")
    assert worked("7", "7") == "<answer>7</answer>"
    for expression, message in (
        ("2 ** 3", "too early|lead to|only whole|invalid"),
        ("1.5 + 1", "only whole numbers"),
        ("(1 + 2", "not closed"),
    ):
        with pytest.raises(ValueError, match=message):
            worked(expression, "0")
    with pytest.raises(ValueError, match="lead to 3, not to 4"):
        worked("1 + 2", "4")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no task 'chain_sums': did you mean chain_sum"):
        Gym("chain_sums", 3)()
    with pytest.raises(ValueError, match=r"no task 'qqqqqq': the .* known ones are .*chain_sum"):
        Gym("qqqqqq", 3)()
    with pytest.raises(ValueError, match=r"does not take .*'max_term'.*its settings are .*max_terms"):
        Gym("chain_sum", 3, config={"max_term": 3})()
    with pytest.raises(ValueError, match="max_terms must be >= min_terms"):
        Gym("chain_sum", 3, config={"max_terms": 1})()
    with pytest.raises(ValueError, match="size must be at least 1"):
        Gym("chain_sum", 0)
    with pytest.raises(ValueError, match=r"only for \['basic_arithmetic', 'chain_sum'\], not 'gcd'"):
        Gym("gcd", 3, per_problem=1)
    with pytest.raises(ValueError, match="did not come from Gym"):
        asyncio.run(GymScore()(Task("t", (), ""), Path("", (), None)))


ATTACKS = [
    "__import__('os').system('touch {file}')",
    "[open('{file}', 'w')]",
    "().__class__",
    'exec(\'open("{file}", "w")\')',
    "entry['answer']",
    "S('1')",
]


@pytest.mark.parametrize("name", sorted(LITERAL | FORMULA))
def test_an_answer_is_never_run_as_code(name: str, tmp_path: Any) -> None:
    problem = Gym(name, 1, seed=3)()[0]
    file = tmp_path / "touched"
    for attack in ATTACKS:
        verdict = scored(problem, attack.format(file=file), GymScore(Whole()))
        assert verdict["reward"] == 0.0, attack
        assert "not a plain formula" in verdict["reason"] or "neither a literal nor plain text" in verdict["reason"]
    assert not file.exists()
    assert scored(problem, problem.answer, GymScore(Whole()))["correct"] == 1


def test_what_may_pass() -> None:
    for answer in ("[[1, 2], [3, 4]]", "1 2 3\n4 5 6", "ABCDE", "_ Q _\nQ _ _", "['A', 'B']", ""):
        assert unsafe({"binary_matrix"}, answer) is None
    for answer in ("a.b", "entry['x']", "f()", "[x for x in y]", "1 if a else b"):
        assert unsafe({"n_queens"}, answer)
    for answer in ("(1+2)*3/4 - 5", "48*x**5 + sin(x)*exp(-x) + C", "log(2*X)", "1.5*y"):
        assert unsafe({"countdown"}, answer) is None
    for answer in ("x.y", "xx", "'a'", "x[0]", "lambda x: x", "x = 1", "a_b", "e^x; y"):
        assert unsafe({"composite", "simple_integration"}, answer)
    assert unsafe({"gcd"}, "__import__('os')") is None, "that scorer evaluates nothing"


def test_no_other_scorer_evaluates_answers() -> None:
    """Reads the installed library: every task whose module could evaluate text is one that we know and have looked at."""
    from reasoning_gym.factory import DATASETS

    on_own_text = {  # they evaluate only what they generated themselves
        "basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic",
    }  # fmt: skip
    found = set()
    for name, (dataset, _) in DATASETS.items():
        tree = ast.parse(inspect.getsource(sys.modules[dataset.__module__]))
        calls = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if calls & {"eval", "exec", "parse_expr", "sympify", "S", "__import__", "import_module"}:
            found.add(name)
    assert found == on_own_text | LITERAL | FORMULA, "a scorer is new or gone: read it before you list it"


WORDS = "0 1 -1 7 42 x a yes no True False None [] {} () [[]] [0] [1] nan inf -inf NaN nanj 1e999 0.5 1/2 ... ? A B UP north red ((( ]]] ' null # *"
JUNK = [
    *WORDS.split(), "hello world", "the answer", "I don't know", "[1, 2, 3]", '{"a": 1}', "9" * 50, "1 2 3", "a b c", "nan + nani", "will halt",
    "[nan, nan]", "\x00", "🙂",
]  # fmt: skip


def full_marks(name: str, seeds: int) -> list[tuple[str, str]]:
    """Junk that scores full although it is not the answer: (junk, answer)."""
    found = []
    for seed in range(seeds):
        try:
            problems = Gym(name, 2, seed=seed)()
        except (ValueError, AssertionError):
            return []  # composite asks for a configuration
        for problem in problems:
            about = json.loads(json.dumps(problem.extra))["gym"]
            for junk in JUNK:
                try:
                    score = Scorer(name)(about, junk)
                except Exception:  # a failure earns nothing
                    continue
                assert 0 <= score <= 1, (name, junk)
                if score >= 1 and not alike(junk, problem.answer):
                    found.append((junk, problem.answer))
    return found


def alike(junk: str, answer: str) -> bool:
    """Whether the junk happens to be the answer."""
    if junk.casefold() == answer.strip().casefold():
        return True
    try:
        return abs(float(junk) - float(answer)) <= 1e-6
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["game_of_life_halting", "coin_flip", "complex_arithmetic"])
def test_scorers_that_took_junk_for_an_answer(name: str) -> None:
    assert full_marks(name, seeds=4) == []
    for problem in Gym(name, 5, seed=9)():
        assert Scorer(name)(json.loads(json.dumps(problem.extra))["gym"], f" {problem.answer}\n") == 1


@pytest.mark.slow
def test_no_scorer_gives_full_marks_to_junk() -> None:
    from reasoning_gym.factory import DATASETS

    assert {name: found for name in sorted(DATASETS) if (found := full_marks(name, seeds=2))} == {}


def test_the_scorer_gets_what_was_checked() -> None:
    problem = Gym("binary_matrix", 1, seed=3)()[0]
    about = json.loads(json.dumps(problem.extra))["gym"]
    assert Scorer("binary_matrix")(about, f"\n {problem.answer} \n") == 1
    with pytest.raises(ValueError, match="neither a literal nor plain text"):
        Scorer("binary_matrix")(about, " __import__('os') ")
