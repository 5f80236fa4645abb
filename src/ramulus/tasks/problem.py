"""A problem as text, and how it becomes a Task of token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ramulus.core.task import Task

PORTION = 64  # texts in one call of a tokenizer: more only takes more memory
CHAT: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}


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
    messages: tuple[dict[str, str], ...] | None = None  # a chat that ends with the problem; None means one user message


class Source(Protocol):
    """A frozen dataclass that lists problems, the same ones in the same order at every call."""

    def __call__(self) -> list[Problem]:
        """All problems."""
        ...


def references(task: Task | Problem) -> tuple[str, ...]:
    """Every reference answer; any of them counts."""
    return tuple(task.extra.get("answers") or (task.answer,))


def render(
    problems: Iterable[Problem],
    tokenizer: Any,
    template: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    on_long: Literal["error", "drop"] = "error",
) -> list[Task]:
    """Tokenize problems: through `template` (it holds `{problem}`) if given, else the chat template, else the bare text.

    `system` is put before chats that have no system message. Prompts above `limit` tokens raise, or with on_long="drop" are
    left out and counted in a warning. Demonstrations get no special tokens but one EOS at the end.
    Raises ValueError for an empty problem or demonstration, a duplicate id, a tokenizer without EOS, a template without `{problem}`.
    """
    if on_long not in ("error", "drop"):
        raise ValueError(f'on_long must be "error" or "drop", got {on_long!r}')
    _check(tokenizer, template, system)
    problems, seen = list(problems), set[str]()
    for problem in problems:
        _check_problem(problem, seen)
    prompts = _prompts(problems, tokenizer, template, system)
    fitting = list(_fitting(zip(problems, prompts, strict=True), limit, on_long))
    shown = iter(_demonstrations([problem for problem, _ in fitting], tokenizer))
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


def _check(tokenizer: Any, template: str | None, system: str | None) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no EOS token, "
            'so no response could end: set one, for example tokenizer.eos_token = "<|endoftext|>"'
        )
    if template is not None and "{problem}" not in template:
        raise ValueError(
            f"the prompt template {template!r} has no {{problem}} in it: say where the problem's text goes"
        )
    if system is not None and (template is not None or not getattr(tokenizer, "chat_template", None)):
        why = "a template was given" if template is not None else "this tokenizer has no chat template"
        raise ValueError(
            f"the system prompt {system[:60]!r} needs a chat template, and {why}: write it into the template"
        )


def _check_problem(problem: Problem, seen: set[str]) -> None:
    if problem.id in seen:
        raise ValueError(f"two problems have the id {problem.id!r}: ids must be unique, seeds hang on them")
    seen.add(problem.id)
    empty = (
        not problem.text.strip() if problem.messages is None else not any(_content(m).strip() for m in problem.messages)
    )
    if empty:
        raise ValueError(f"problem {problem.id!r} is empty: remove it, or check the column that prompts are read from")


def _content(message: dict[str, str]) -> str:
    return message.get("content") or ""


def _prompts(problems: Sequence[Problem], tokenizer: Any, template: str | None, system: str | None) -> list[list[int]]:
    """Token ids of the prompts, generation prompt included."""
    if template is None and getattr(tokenizer, "chat_template", None):
        chats = [_chat(problem, system) for problem in problems]
        return [ids for some in _portions(chats) for ids in tokenizer.apply_chat_template(some, **CHAT)]
    # str.replace, not str.format: templates and problems are full of LaTeX braces
    texts = [problem.text if template is None else template.replace("{problem}", problem.text) for problem in problems]
    prompts = _encode(texts, tokenizer)
    for text, ids in zip(texts, prompts, strict=True):
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids.pop()  # some tokenizers end every text with EOS; a prompt must stay open
    return prompts


def _chat(problem: Problem, system: str | None) -> list[dict[str, str]]:
    """The messages of a problem, with the system message where it has none."""
    messages = list(problem.messages or ({"role": "user", "content": problem.text},))
    if system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _demonstrations(problems: Sequence[Problem], tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of all worked solutions, problem by problem, with one EOS at the end of each."""
    for problem in problems:
        if not all(text.strip() for text in problem.demonstrations):
            raise ValueError(
                f"problem {problem.id!r} has an empty demonstration: remove it, or check the column it is read from"
            )
    solutions = _encode(
        [text for problem in problems for text in problem.demonstrations], tokenizer, add_special_tokens=False
    )
    end = tokenizer.eos_token_id
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
