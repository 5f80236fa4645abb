"""Problems become tasks: chat templates, plain templates, limits, and every input that must be refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ramulus.tasks.chain import ChainSum
from ramulus.tasks.problem import PORTION, Problem, references, render

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
