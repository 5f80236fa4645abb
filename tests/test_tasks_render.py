"""Problems become tasks: chat templates, plain templates, limits, and every input that must be refused."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ramulus.tasks.chain import ChainSum
from ramulus.tasks.examples import WorkedExample, after_examples, worked_examples
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import PORTION, Problem, references, render
from ramulus.tasks.self_check import unmatched

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-=?{}\\ .:\n"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def characters(eos: bool = True, chat: bool = False, alphabet: str = CHARACTERS) -> Any:
    """A character tokenizer built here, so that the tests need no files."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *alphabet])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>" if eos else None, unk_token="<unk>")
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def shown(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(list(tokens))


def test_bare_text_and_its_fields() -> None:
    tokenizer = characters()
    problem = Problem("a", "1+2?", "3", ("1+2=3\n=3",), {"kind": "sum"})
    (task,) = render([problem], tokenizer)
    assert (task.id, task.text, task.answer, task.extra) == ("a", "1+2?", "3", {"kind": "sum"})
    assert shown(tokenizer, task.prompt) == "1+2?"
    assert shown(tokenizer, task.demonstrations[0]) == "1+2=3\n=3<eos>"
    assert references(task) == ("3",)


def test_template_with_latex_braces() -> None:
    tokenizer = characters()
    (task,) = render([Problem("a", "1{+}2")], tokenizer, template="Q: {problem}\nanswer in \\boxed{}.\n")
    assert shown(tokenizer, task.prompt) == "Q: 1{+}2\nanswer in \\boxed{}.\n"


def test_chat_template_with_text_messages_and_system() -> None:
    tokenizer = characters(chat=True)
    messages = ({"role": "system", "content": "own"}, {"role": "user", "content": "two"})
    text, given = render([Problem("a", "one"), Problem("b", "two", messages=messages)], tokenizer, system="be brief")
    assert shown(tokenizer, text.prompt) == "system: be brief\nuser: one\nassistant: "
    assert shown(tokenizer, given.prompt) == "system: own\nuser: two\nassistant: ", "a chat's own system message stays"
    (plain,) = render([Problem("a", "one")], tokenizer, template="{problem}")
    assert shown(tokenizer, plain.prompt) == "one", "a template goes before the chat template"


def test_eos_is_added_once_and_never_to_a_prompt() -> None:
    tokenizer = characters()
    (task,) = render([Problem("a", "x", demonstrations=("y<eos>", "z"))], tokenizer)
    assert [d.count(tokenizer.eos_token_id) for d in task.demonstrations] == [1, 1]

    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    (task,) = render([Problem("a", "x", demonstrations=("y",))], tokenizer)
    assert shown(tokenizer, task.prompt) == "x"
    assert shown(tokenizer, task.demonstrations[0]) == "y<eos>"


def test_long_prompts_raise_or_are_dropped_and_counted() -> None:
    tokenizer = characters()
    problems = [Problem("short", "abc"), Problem("long", "abcdefgh"), Problem("edge", "abcde")]
    with pytest.raises(ValueError, match=r"'long' has 8 tokens, the limit is 5: .*on_long=\"drop\""):
        render(problems, tokenizer, limit=5)
    with pytest.warns(UserWarning, match="left out 1 of 3 problems with prompts above 5 tokens, the first is 'long'"):
        assert [task.id for task in render(problems, tokenizer, limit=5, on_long="drop")] == ["short", "edge"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(render(problems, tokenizer, limit=8, on_long="drop")) == 3


@pytest.mark.parametrize(
    ("problems", "options", "message"),
    [
        ([Problem("a", " \n")], {}, "'a' is empty"),
        ([Problem("a", "x", messages=({"role": "user", "content": ""},))], {}, "'a' is empty"),
        ([Problem("a", "x"), Problem("a", "y")], {}, "two problems have the id 'a'"),
        ([Problem("a", "x", demonstrations=("",))], {}, "empty demonstration"),
        ([Problem("a", "x")], {"template": "Q:"}, r"'Q:' has no \{problem\}"),
        ([Problem("a", "x")], {"system": "be good"}, "no chat template"),
        ([Problem("a", "x")], {"on_long": "cut"}, "got 'cut'"),
    ],
)
def test_bad_input(problems: list[Problem], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(problems, characters(), **options)


LOOP: dict[str, Any] = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (None, "a source of problems gave a NoneType"),
        ([{"id": "a", "text": "1+1?"}], "problem 1 of the source is a dict"),
        ([Problem("a", "x"), "1+1?"], "problem 2 of the source is a str, '1.1.': make it a Problem"),
        ([Problem(7, "x")], "problem 1 of the source has id='7' of the type int: an id is text"),
        ([Problem("a", 11)], "problem 'a' has text='11' of the type int"),
        ([Problem("a", None)], "problem 'a' has text='None' of the type NoneType"),
        ([Problem("a", "x", 2)], "problem 'a' has answer='2' of the type int: an answer is text"),
        ([Problem("a", "x", ["2", "3"])], r"problem 'a' has answer=.* of the type list: .* extra={'answers': \[...\]} lists them"),
        ([Problem("a", "x", demonstrations="12")], "problem 'a' has demonstrations='12' of the type str: give a tuple of texts"),
        ([Problem("a", "x", demonstrations=(1,))], "problem 'a' has demonstrations=.*: a demonstration is text"),
        ([Problem("a", "x", extra=[1])], "problem 'a' has extra=.* of the type list"),
        ([Problem("a", "x", messages={"role": "user", "content": "x"})], "problem 'a' has messages=.* of the type dict"),
        ([Problem("a", "x", extra={"f": len})], "problem 'a' has an extra that cannot be written into trees, <built-in function len> is a "),
        ([Problem("a", "x", extra={"f": [Fraction(1, 2)]})], "problem 'a' has an extra that cannot be written into trees, .*Fraction"),
        ([Problem("a", "x", extra=LOOP)], "problem 'a' has an extra that cannot be written into trees, .*: use plain str"),
    ],
)
def test_fields_of_other_types_are_refused_before_work(problems: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(problems, characters())
    with pytest.raises(ValueError, match=message):
        after_examples(problems, [WorkedExample("1+1?", "2")], None, chat=False)
    with pytest.raises(ValueError, match=message):
        worked_examples(problems, None)


def test_extras_that_trees_hold_are_taken_and_further_answers_are_texts() -> None:
    extra = {"set": {1}, "tuple": (1, 2), 3: float("nan"), "answers": ["2", "3"]}
    (task,) = render([Problem("a", "x", "2", ["two"], extra)], characters())
    assert references(task) == ("2", "3")
    for answers in ("23", 23, [2, 3], {"2": 1}):
        with pytest.raises(ValueError, match=r"problem 'a' has .* as extra\['answers'\]: give a list of texts"):
            unmatched(Boxed(), [Problem("a", "x", "2", extra={"answers": answers})])


def test_tokenizer_without_eos() -> None:
    with pytest.raises(ValueError, match=r"no EOS token.*tokenizer\.eos_token = "):
        render([Problem("a", "x")], characters(eos=False))


def test_chain_sums_round_trip_through_their_alphabet() -> None:
    source = ChainSum(50)
    tokenizer = characters(alphabet=source.alphabet)
    for problem, task in zip(source(), render(source(), tokenizer)):
        assert shown(tokenizer, task.prompt) == problem.text
        assert shown(tokenizer, task.demonstrations[0]) == problem.demonstrations[0] + "<eos>"
        assert tokenizer.unk_token_id not in task.prompt + task.demonstrations[0]


@pytest.mark.parametrize("chat", [False, True])
def test_many_problems_become_what_each_becomes_alone(chat: bool) -> None:
    tokenizer = characters(chat=chat)
    problems = [
        Problem(str(i), "x" * (i % 9 + 1), str(i), tuple("y" * n for n in range(1, i % 4 + 1))) for i in range(2 * PORTION + 3)
    ]
    alone = [task for problem in problems for task in render([problem], tokenizer)]
    assert render(problems, tokenizer) == alone
    limit = max(len(task.prompt) for task in alone) - 1
    with pytest.warns(UserWarning, match=r"left out \d+ of"):
        kept = render(problems, tokenizer, limit=limit, on_long="drop")
    assert kept == [task for task in alone if len(task.prompt) <= limit], "demonstrations stay with their problems"
