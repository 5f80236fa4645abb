"""Rewards without a library, and where in a response the answer is found."""

from __future__ import annotations

import time
import warnings

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ramulus.core.task import Path, Reward, Task
from ramulus.core.text import last_box
from ramulus.run.runtime import Detokenizer
from ramulus.tasks.answers import LastBox, LastLine, LastNumber, Tagged, Whole
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import Problem, render
from ramulus.tasks.rewards import ExactAnswer, Format, Overlong, Unmarked
from ramulus.tasks.self_check import unmatched

TASK = Task("t", (), "?", "7", extra={})


def path(text: str, length: int = 1) -> Path:
    return Path(text, tuple(range(length)), "eos")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", r"\boxed{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\\}", "a\\\\"),
        (r"\fbox{4}", "4"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", "5"),
        (r"\boxed 5.", "5"),
        (r"in \boxed format", None),
        (r"\\boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{1} so \boxed{2}", "2"),
        (r"}} \boxed{6}", "6"),
        (r"{ \boxed{6}", "6"),
        ("\\boxed{two\nlines}", "two\nlines"),
        ("", None),
        ("no box", None),
    ],
)
def test_last_box(text: str, found: str | None) -> None:
    assert last_box(text) == found


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 50_000, "{" * 200_000 + "}" * 200_000, "\\boxed " * 50_000, "\\" * 300_001]
)
def test_last_box_is_linear_on_hostile_text(text: str) -> None:
    began = time.process_time()
    last_box(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("extract", "text", "found"),
    [
        (Whole(), " a \n", "a"),
        (Whole(), " \n", None),
        (LastLine(), "one\ntwo\n\n", "two"),
        (LastLine("Answer:"), "x\nAnswer: 4", "4"),
        (LastLine("Answer:"), "Answer: 4\nx", None),
        (LastBox(), r"\boxed{ 4 }", "4"),
        (LastBox(), r"\boxed{ }", None),
        (Tagged(), "<answer>1</answer> <answer> 2 </answer>", "2"),
        (Tagged(), "<answer>1</answer> <answer>2", "1"),
        (Tagged(), "1</answer>", None),
        (Tagged("final"), "<final>x</final>", "x"),
    ],
)
def test_extracts(extract: object, text: str, found: str | None) -> None:
    assert extract(text) == found  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4 apples and 1,000 pears are 1,004 pieces.", "1004"), ("5-3", "3"), ("x is -3.", "-3"), ("(2)-3", "3"), ("40%", "40"), ("2/3", "2/3"),
        (".5", ".5"), ("-.5", "-.5"), ("so it is...5", "5"), ("a.5", "5"), ("v2.5", "2.5"), ("1e5", "1e5"), ("1.5e-3", "1.5e-3"), ("2e", "2"),
        ("\u22125", "-5"), ("5\u22123", "3"), ("1e\u22123", "1e-3"), ("-$5", "-5"), ("-\\$5", "-5"), ("$-5$", "-5"), ("$18", "18"), ("€.5", ".5"),
        ("1\u202f000\u202f000", "1000000"), (r"1{,}234", "1234"), (r"\$1\,234", "1234"), ("1,2,3", "3"), ("1,234,56", "56"), ("1 and 2", "2"),
        (r"\frac{1}{2}", "1/2"), (r"$-\dfrac{3}{4}$", "-3/4"), ("none", None), ("", None),
        ("7" + " none" * 5000, "7"), ("1,234" + "." * 1000, "1234"), ("8" * 1500, "8" * 1500), ("x" * 998 + "123", "123"),
        ("-123" + "x" * 997, "-123"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, found: str | None) -> None:
    assert LastNumber()(text) == found


@pytest.mark.parametrize("text", [",111" * 100_000 + "1", "1,111," * 100_000, "1" * 400_000 + "x", "-" * 400_000, ".1" * 200_000, "1/1" * 100_000])
def test_the_last_number_of_hostile_text_takes_no_time(text: str) -> None:
    began = time.process_time()
    LastNumber()(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("reference", ["1,234", "$18", "2,500 ", "3/4", "#### 72"])
def test_the_number_in_a_reference_counts_where_the_last_number_of_an_answer_does(reference: str) -> None:
    reward, task = ExactAnswer(LastNumber()), Task("t", (), "?", reference)
    assert reward(task, path(f"So it is {reference}."))["correct"] == 1
    assert reward(task, path("So it is 17."))["correct"] == 0
    assert unmatched(reward, [task]) == []


def test_exact_answer() -> None:
    assert ExactAnswer()(TASK, path(" 7\n")) == {"reward": 1.0, "correct": 1.0, "answer": "7"}
    assert ExactAnswer(correct=2, wrong=-1)(TASK, path("8")) == {"reward": -1, "correct": 0.0, "answer": "8"}
    several = Task("t", (), "?", "Yes", extra={"answers": ["Yes", "true"]})
    assert ExactAnswer(LastLine())(several, path("hm\ntrue"))["correct"] == 1
    assert ExactAnswer()(several, path("yes"))["correct"] == 0
    assert ExactAnswer(ignore_case=True)(several, path("yes"))["correct"] == 1
    assert ExactAnswer(Tagged())(TASK, path("7"))["correct"] == 0


def test_format() -> None:
    reward = Format(r"<think>.*</think>\s*<answer>.*</answer>", wrong=-0.5)
    assert reward(TASK, path("<think>a\nb</think>\n<answer>c</answer>")) == 1
    assert reward(TASK, path("<answer>c</answer>")) == -0.5
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        Format("(")


def test_overlong_is_dapos_formula() -> None:
    reward = Overlong(limit=7168, buffer=512)
    for length in (0, 6655, 6656, 6657, 6912, 7168):
        assert reward(TASK, path("", length)) == pytest.approx(min(0.0, -(length - (7168 - 512)) / 512))
    assert reward(TASK, path("", 9000)) == -1
    assert Overlong(10, 10, 0.5)(TASK, path("", 5)) == pytest.approx(-0.25)
    for limit, buffer in ((10, 0), (10, 11)):
        with pytest.raises(ValueError, match=f"between 1 and the limit of 10 tokens, got {buffer}"):
            Overlong(limit, buffer)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        Overlong(10, 5, -1)


def test_special_tokens_stay_in_what_rewards_see() -> None:
    base = Tokenizer(models.WordLevel({"[E]": 0, "[P]": 1, "[B]": 2, "<answer>": 3, "</answer>": 4, "So": 5, "5": 6, "<|im_end|>": 7}))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="[E]", pad_token="[P]", bos_token="[B]", additional_special_tokens=["<answer>", "</answer>", "<|im_end|>"]
    )
    decode = Detokenizer(tokenizer, (7,))
    text = decode([2, 5, 3, 6, 4, 7, 0, 1])
    assert text.split() == ["So", "<answer>", "5", "</answer>"]
    padded = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="[E]", pad_token="5")  # some models fill with a word
    assert Detokenizer(padded)([5, 6, 0]).split() == ["So", "5"]
    task = Task("t", (), "?", "5")
    assert ExactAnswer(Tagged())(task, path(text))["correct"] == 1
    assert Unmarked(ExactAnswer(LastLine("So")), ("<answer>", "</answer>"))(task, path(text))["correct"] == 1


@pytest.mark.parametrize(("template", "prompt"), [("<s>{problem}", [0, 2, 3]), ("{problem}", [0, 2, 3]), ("<s><s>{problem}", [0, 0, 0, 2, 3])])
def test_a_template_that_begins_as_the_tokenizer_does_begins_once(template: str, prompt: list[int]) -> None:
    base = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, []))
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tasks = render([Problem("p", "ab"), Problem("q", "ab")], tokenizer, template)
    assert [list(task.prompt) for task in tasks] == [prompt, prompt]
    assert ["it stands there once" in str(one.message) for one in heard] == [True] * (template == "<s>{problem}")


@pytest.mark.parametrize(
    ("reward", "answer", "why"),
    [
        (Boxed(), "5", ""),
        (Boxed(), r"\boxed{1},\boxed{2}", ""),
        (Boxed(), "The answer is 42.", ""),
        (Boxed(), r"\text{no solution}", ""),
        (Boxed(), " ", "the reference is empty"),
        (Boxed(), "$$", "is not right against itself"),
        (Boxed(), r"\frac{1}{2", "no answer is found in"),
        (Boxed(), "9" * 3000, "it has 3000 characters, more than 2000"),
        (Boxed(), "It is shown above that no such function can exist.", "is prose: only the same words would match"),
        (ExactAnswer(), "5 \n", ""),
        (ExactAnswer(LastLine()), "5\n6", "gives '6'"),
        (ExactAnswer(Tagged()), "a<answer>b", "gives 'b'"),
        (ExactAnswer(LastNumber()), "1,234", ""),
        (ExactAnswer(LastNumber()), "red", "no answer is found in 'red'"),
        (Boxed(extract=LastNumber()), "$1,234", ""),
        (Boxed(extract=LastNumber()), "x+1", "'x+1' gives '1'"),
        (Format("x"), "", ""),
    ],
)
def test_references_are_checked_against_themselves(reward: Reward, answer: str, why: str) -> None:
    found = unmatched(reward, [Task("fine", (), "?", "5"), Task("t", (), "?", answer)])
    assert (why in found[0][1] and found[0][0] == "t") if why else not found
