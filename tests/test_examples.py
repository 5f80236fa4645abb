"""Worked examples before a problem, rules of extraction from the command line, and system messages of reasoning-gym tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ramulus import Boxed, ExactAnswer, File, Gym, Problem, Scratch
from ramulus.run.config.resume import build
from ramulus.run.prompts import prompts_of
from ramulus.tasks.answers import LastBox, LastLine, LastNumber, Tagged, Whole, extraction
from ramulus.tasks.examples import WorkedExample, after_examples, worked_examples
from ramulus.tasks.gym import GymScore
from run_recipe import rl

SHOTS = [Problem("a", "1+1?", "2", ("1 and 1",)), Problem("b", "2+2?", "4")]
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.mark.parametrize(
    ("extract", "solutions"),
    [
        (LastBox(), ["1 and 1\n\\boxed{2}", "\\boxed{4}"]),
        (Tagged(), ["1 and 1\n<answer>2</answer>", "<answer>4</answer>"]),
        (LastNumber(), ["1 and 1", "4"]),
        (None, ["1 and 1", "4"]),
    ],
)
def test_an_example_is_answered_in_the_form_that_is_read(extract: object, solutions: list[str]) -> None:
    assert [example.solution for example in worked_examples(SHOTS, extract)] == solutions  # type: ignore[arg-type]


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="'c' has neither a demonstration nor an answer"):
        worked_examples([Problem("c", "?")], LastBox())


def test_examples_are_turns_behind_the_system_message() -> None:
    own = Problem("p", "3+3?", messages=({"role": "system", "content": "S"}, {"role": "user", "content": "3+3?"}))
    shown, template = after_examples([own, replace(own, id="q", messages=None)], [WorkedExample("1+1?", "2")], None, chat=True)
    said = [[(m["role"], m["content"]) for m in problem.messages or ()] for problem in shown]
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "3+3?")]
    assert said == [[("system", "S"), *turns], turns]
    assert template is None


def test_examples_stand_before_a_template_and_are_no_problems_themselves() -> None:
    problems = [Problem("p", "3+3?"), Problem("q", "1+1?")]
    with pytest.warns(UserWarning, match="left out 1 of 2 problems, which are among the examples"):
        shown, template = after_examples(problems, [WorkedExample("1+1?", "2")], "Q: {problem}\nA:", chat=True)
    assert [problem.id for problem in shown] == ["p"]
    assert template == "Q: 1+1?\nA: 2\n\nQ: {problem}\nA:"
    assert after_examples(problems[:1], [WorkedExample("1+1?", "2")], None, chat=False)[1] == "1+1?\n2\n\n{problem}\n"


def test_a_run_shows_them(tmp_path: Path) -> None:
    """From a file of problems, to the tokens of a prompt."""
    (tmp_path / "shots.jsonl").write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    run = replace(rl(), examples=File(str(tmp_path / "shots.jsonl")), rewards=Boxed(), template=None, system="be brief", prompt_limit=64)
    _, tokenizer = Scratch("0123456789+<>={}\\ abcdefghijklmnopqrstuvwxyz", hidden=16, layers=1, heads=2, kv_heads=1)()
    tokenizer.chat_template = TEMPLATE
    ((task,),) = prompts_of(run, [[Problem("p", "3+3", "6")]], tokenizer)
    assert tokenizer.decode(task.prompt) == "<s>be brief<u>1+1<a>\\boxed{2}<u>3+3<a>"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"), ("-3", "-3"), ("5-3", "3"), ("1,234.5 apples", "1234.5"), ("x = 2/3, so", "2/3"), ("40%", "40"), ("none", None),
        ("1, 2,3", "3"), ("(4)-5", "5"), ("3.", "3"), ("= -0.5", "-0.5"), ("12,34", "34"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: str | None) -> None:
    assert LastNumber()(text) == number


@pytest.mark.parametrize(
    ("word", "rule"),
    [("box", LastBox()), ("number", LastNumber()), ("line", LastLine()), ("whole", Whole()), ("tag", Tagged()), ("tag:final", Tagged("final"))],
)
@pytest.mark.parametrize("kind", [Boxed, ExactAnswer, GymScore])
def test_rules_of_extraction_in_words(word: str, rule: object, kind: type) -> None:
    (run,), _ = build("smol", [f"rewards={kind.__name__}", f"rewards.extract={word}"])
    assert run.rewards == kind(extract=rule)
    assert extraction(word) == rule


def test_no_rule_of_extraction() -> None:
    with pytest.raises(ValueError, match=r"rewards.extract=boxes: an answer is looked for in box, number, line, whole, tag or tag:NAME"):
        build("smol", ["rewards=Boxed", "rewards.extract=boxes"])


def test_a_gym_task_from_the_command_line() -> None:
    words = ["tasks=gym:chain_sum", "tasks.size=3", "tasks.system=Answer in a box.", "rewards=GymScore", "rewards.extract=box"]
    (run,), _ = build("smol", [*words, "examples=gym:chain_sum", "examples.size=2", "examples.start=100", "examples.per_problem=1"])
    assert run.tasks == Gym("chain_sum", size=3, system="Answer in a box.")
    problem = run.tasks()[0]
    assert [m["role"] for m in problem.messages or ()] == ["system", "user"]
    examples = worked_examples(run.examples(), run.rewards.extract)
    assert len(examples) == 2
    assert all("\\boxed{" in example.solution for example in examples)
