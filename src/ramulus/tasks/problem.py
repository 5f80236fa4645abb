"""A problem as text, and how it becomes a Task of token ids."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Protocol

from ramulus.core.tagged_json import encode
from ramulus.core.task import Task
from ramulus.tasks.chat import ChatTemplate, chat_template, content_text, name_of

PORTION = 64  # texts in one call of a tokenizer: more only takes more memory


@dataclass(frozen=True)
class Problem:
    """One problem before any tokenizer has seen it.

    Example:
        >>> from ramulus import Problem
        >>> Problem("sum", "What is 1+2?", answer="3").answer
        '3'
    """

    id: str  # unique in its source
    text: str  # as a person reads it
    answer: str = ""  # the reference answer; further right answers in extra["answers"]
    demonstrations: tuple[str, ...] = ()  # worked solutions, without EOS
    extra: dict[str, Any] = field(default_factory=dict)  # what a scorer needs beyond the answer; plain JSON
    messages: tuple[dict[str, Any], ...] | None = None  # a chat that ends with the problem; None means one user message


class Source(Protocol):
    """A frozen dataclass that lists problems, the same ones in the same order at every call.

    Example:
        >>> from ramulus import ChainSum, Source
        >>> source: Source = ChainSum(3)
        >>> len(source()), source() == source()
        (3, True)
    """

    def __call__(self) -> list[Problem]:
        """Every problem of the source, in its order."""
        ...


def references(task: Task | Problem) -> tuple[str, ...]:
    """Every reference answer; any of them counts. Raises ValueError where extra["answers"] holds no texts."""
    answers = task.extra.get("answers") or (task.answer,)
    if not isinstance(answers, list | tuple | set | frozenset) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"problem {task.id!r} has {str(answers)[:60]!r} as extra['answers']: give a list of texts, any of which is right")
    return tuple(answers)


_FIELDS: tuple[tuple[str, type[Any] | UnionType, str], ...] = (
    ("id", str, "an id is text"),
    ("text", str, "give text"),
    ("answer", str, "an answer is text; where several are right, extra={'answers': [...]} lists them"),
    ("demonstrations", list | tuple, "give a tuple of texts, with a comma behind a single one"),
    ("extra", dict, "give a dict of plain values"),
    ("messages", list | tuple | None, "give a tuple of dicts with role and content"),
)  # of a Problem: what each may be, and the remedy


def check_fields(problems: Iterable[Problem]) -> list[Problem]:
    """The problems as a list. Raises ValueError for what is no Problem, and for fields of other types, or that no tree at rest can hold."""
    if not isinstance(problems, Iterable):
        raise ValueError(f"a source of problems gave a {type(problems).__name__}: it must return a list of Problem(id, text, answer)")
    problems = list(problems)
    for number, problem in enumerate(problems, 1):
        if not isinstance(problem, Problem):
            raise ValueError(
                f"problem {number} of the source is a {type(problem).__name__}, {str(problem)[:60]!r}: make it a Problem(id, text, answer)"
            )
        name = repr(problem.id) if isinstance(problem.id, str) else f"{number} of the source"
        for field_name, kind, remedy in _FIELDS:
            value = getattr(problem, field_name)
            if not isinstance(value, kind):
                raise ValueError(f"problem {name} has {field_name}={str(value)[:60]!r} of the type {type(value).__name__}: {remedy}")
        if not all(isinstance(text, str) for text in problem.demonstrations):
            raise ValueError(f"problem {name} has demonstrations={str(problem.demonstrations)[:60]!r}: a demonstration is text")
        try:
            json.dumps(encode(problem.extra))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"problem {name} has an extra that cannot be written into trees, {error}: use plain str, int, float, bool, None, list, tuple, set "
                "and dict"
            ) from None
    return problems


def render(
    problems: Iterable[Problem],
    tokenizer: Any,
    template: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    on_long: Literal["error", "drop"] = "error",
    arguments: Mapping[str, Any] | None = None,
    date: str = "",
    before: str = "",
) -> list[Task]:
    """Tokenize problems: through `template` (it holds `{problem}`) if given, else the chat template, else the bare text.

    `before` stands as it is in front of every prompt of a template.

    `system` is put before chats that have no system message. `arguments` go to the chat template (enable_thinking, say), and so does the `date`
    where it writes one, YYYY-MM-DD; "" is today. Prompts above `limit` tokens raise, or with on_long="drop" are left out and counted in a
    warning. Demonstrations get no special tokens but one at the end: that of an assistant's turn in the chat template, else EOS. Raises ValueError
    as `check_fields` does, for an empty problem or demonstration, a chat that ends with an assistant's turn, that the template refuses or of which a
    message would be left out, a duplicate id, a tokenizer without EOS, a template without `{problem}`.
    """
    if on_long not in ("error", "drop"):
        raise ValueError(f'on_long must be "error" or "drop", got {on_long!r}')
    chats = chat_template(tokenizer, arguments, date) if template is None else None
    why = "a template was given" if template is not None else "this tokenizer has no chat template"
    _check(tokenizer, template, system, chats, arguments, why)
    problems, seen = check_fields(problems), set[str]()
    for problem in problems:
        _check_problem(problem, seen)
    _check_turns(problems, system, chats, why)
    prompts = _prompts(problems, tokenizer, template, system, chats, before)
    fitting = list(_fitting(zip(problems, prompts, strict=True), limit, on_long))
    shown = iter(_demonstrations([problem for problem, _ in fitting], tokenizer, chats.turn_end() if chats else None))
    tasks = [
        Task(p.id, tuple(prompt), p.text, p.answer, tuple(next(shown) for _ in p.demonstrations), p.extra)
        for p, prompt in fitting
    ]
    if dropped := seen - {task.id for task in tasks}:
        first = next(problem.id for problem in problems if problem.id in dropped)
        warnings.warn(
            f"left out {len(dropped)} of {len(problems)} problems with prompts above {limit} tokens, the first is {first!r}",
            stacklevel=2,
        )
    return tasks


def check_ids(tasks: Iterable[Task], tokenizer: Any, rows: int) -> None:
    """Raise ValueError for a token that a model with so many rows of embeddings does not have."""
    for task in tasks:
        for what, tokens in (("prompt", task.prompt), *(("demonstration", shown) for shown in task.demonstrations)):
            if tokens and max(tokens) >= rows:
                beyond = next(token for token in tokens if token >= rows)
                name = tokenizer.convert_ids_to_tokens(beyond)
                raise ValueError(
                    f"the {what} of problem {task.id!r} holds the token {name!r} with id {beyond}, but the model has embeddings for {rows} tokens: "
                    f"call model.resize_token_embeddings({len(tokenizer)}) and save the model, or leave the token out"
                )


def _fitting(
    prompted: Iterable[tuple[Problem, list[int]]], limit: int | None, on_long: str
) -> Iterator[tuple[Problem, list[int]]]:
    """The problems whose prompts (token ids) are within `limit`; ValueError for an empty prompt, or one above it unless those are dropped."""
    for problem, prompt in prompted:
        if not prompt:
            raise ValueError(
                f"problem {problem.id!r} has no prompt tokens: the tokenizer knows none of {problem.text[:60]!r}"
            )
        if limit is None or len(prompt) <= limit:
            yield problem, prompt
        elif on_long == "error":
            raise ValueError(
                f"the prompt of problem {problem.id!r} has {len(prompt)} tokens, the limit is {limit}: "
                'raise the limit, shorten the problem, or pass on_long="drop" to leave such problems out'
            )


def _check(
    tokenizer: Any, template: str | None, system: str | None, chats: ChatTemplate | None, arguments: Mapping[str, Any] | None, why: str
) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name_of(tokenizer)!r} has no EOS token, "
            'so no response could end: set one, for example tokenizer.eos_token = "<|endoftext|>"'
        )
    if template is not None and "{problem}" not in template:
        raise ValueError(
            f"the prompt template {template!r} has no {{problem}} in it: say where the problem's text goes"
        )
    if system is not None and chats is None:
        raise ValueError(
            f"the system prompt {system[:60]!r} needs a chat template, and {why}: write it into the template"
        )
    if system is not None and chats is not None and 0 in chats.left_out(("system", "user")):
        raise ValueError(f"the chat template of {chats.name!r} leaves system messages out: put {system[:60]!r} before {{problem}} in template=...")
    if arguments and chats is None:
        raise ValueError(f"template_arguments={dict(arguments)!r} are for a chat template, and {why}: leave them out")


_SURROGATES = re.compile("[\ud800-\udfff]")  # of characters beyond 16 bits, which JSON may name one by one


def _check_problem(problem: Problem, seen: set[str]) -> None:
    if problem.id in seen:
        raise ValueError(f"two problems have the id {problem.id!r}: ids must be unique, seeds hang on them")
    seen.add(problem.id)
    where = f"problem {problem.id!r}"
    for message in problem.messages or ():
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} has the message {str(message)[:60]!r}: a message has a role and a content")
    if problem.messages and problem.messages[-1]["role"] == "assistant":
        raise ValueError(f"{where} ends with an assistant's turn, which is an answer and no prompt: make it a demonstration, or cut it off")
    texts = [problem.text] if problem.messages is None else [content_text(m.get("content"), where) for m in problem.messages]
    if not any(text.strip() for text in texts):
        raise ValueError(f"problem {problem.id!r} is empty: remove it, or check the column that prompts are read from")
    for text in (*texts, *problem.demonstrations):
        if not text.isascii() and (torn := _SURROGATES.search(text)):
            shown = text[max(torn.start() - 20, 0) : torn.end()]
            raise ValueError(f"{where} holds half of a character, {shown!r}, which no tokenizer reads: a text was cut inside it; mend or remove it")


def _check_turns(problems: Sequence[Problem], system: str | None, chats: ChatTemplate | None, why: str) -> None:
    """Raise ValueError where a message would be left out: by the chat template, or since there is none, which leaves the text of the problem.

    Where that text is the last turn alone, as of made problems that come after worked ones, the turns before are left out with a warning.
    """
    lost: dict[tuple[str, ...], list[int]] = {}  # of chats with these roles
    shortened = 0
    for problem in problems:
        chat = _chat(problem, system) if problem.messages else []
        roles = tuple(message["role"] for message in chat)
        if roles not in lost:
            lost[roles] = chats.left_out(roles) if chats else [i for i, role in enumerate(roles) if role != "user"]
        left = next((chat[i] for i in lost[roles] if chat[i]["content"].strip() or chat[i].get("tool_calls")), None)
        if left is None:
            continue
        if chats is None and stands_alone(problem):
            shortened += 1
            continue
        cause = f"the chat template of {chats.name!r} leaves it out" if chats else f"only a chat template would show it, and {why}"
        raise ValueError(
            f"problem {problem.id!r} has the message {left['content'][:60]!r} of the role {left['role']!r}, but {cause}: put it before "
            "{problem} in template=... and name the user's text alone as the column of prompts (messages.1.content, say), or leave such problems out"
        )
    if shortened:
        warnings.warn(
            f"the worked examples in the chats of {shortened} problems are left out, as only a chat template shows them, and {why}", stacklevel=3
        )


def stands_alone(problem: Problem) -> bool:
    """Whether the text of a problem is the last turn of its chat and the user began, so that the turns before are worked examples."""
    messages = problem.messages or ()
    roles = [message["role"] for message in messages]
    return roles[:1] == ["user"] and "system" not in roles and content_text(messages[-1].get("content"), problem.id) == problem.text


def _prompts(
    problems: Sequence[Problem], tokenizer: Any, template: str | None, system: str | None, chats: ChatTemplate | None, before: str
) -> list[list[int]]:
    """Token ids of the prompts, generation prompt included."""
    if chats is not None:
        return [
            ids for some in _portions(problems) for ids in chats.prompts([_chat(p, system) for p in some], [p.id for p in some])
        ]
    # str.replace, not str.format: templates and problems are full of LaTeX braces
    texts = [problem.text if template is None else before + template.replace("{problem}", problem.text) for problem in problems]
    prompts, begin, doubled = _encode(texts, tokenizer), getattr(tokenizer, "bos_token", None), False
    for text, ids in zip(texts, prompts, strict=True):
        if begin and text.startswith(begin) and not text.startswith(2 * begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
            doubled = True
            del ids[0]
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids.pop()  # some tokenizers end every text with EOS; a prompt must stay open
    if doubled:
        warnings.warn(f"prompts begin with {begin}, which this tokenizer puts before every text: it stands there once", stacklevel=2)
    return prompts


def _chat(problem: Problem, system: str | None) -> list[dict[str, Any]]:
    """The messages of a problem, their contents as text, with the system message where it has none."""
    given = problem.messages or ({"role": "user", "content": problem.text},)
    messages = [message | {"content": content_text(message.get("content"), problem.id)} for message in given]
    if system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _demonstrations(problems: Sequence[Problem], tokenizer: Any, end: int | None) -> list[tuple[int, ...]]:
    """Token ids of all worked solutions, problem by problem, each with one `end` behind it, None for EOS."""
    for problem in problems:
        if not all(text.strip() for text in problem.demonstrations):
            raise ValueError(
                f"problem {problem.id!r} has an empty demonstration: remove it, or check the column it is read from"
            )
    solutions = _encode(
        [text for problem in problems for text in problem.demonstrations], tokenizer, add_special_tokens=False
    )
    end = tokenizer.eos_token_id if end is None else end
    return [tuple(ids if ids[-1:] == [end] else [*ids, end]) for ids in solutions]


def _encode(texts: Sequence[str], tokenizer: Any, **options: Any) -> list[list[int]]:
    """Token ids of each text; many at a call, since a call costs far more than a short text."""
    return [
        list(ids)
        for some in _portions(texts)
        for ids in tokenizer(some, return_attention_mask=False, **options).input_ids
    ]


def _portions(items: Sequence[Any]) -> Iterator[list[Any]]:
    """The items in order, some at a time, so that the memory of a call stays small."""
    return (list(items[start : start + PORTION]) for start in range(0, len(items), PORTION))
