"""A problem as text, and how it becomes a Task of token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ramify.core.task import Task


@dataclass(frozen=True)
class Problem:
    """One problem before any tokenizer has seen it."""

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
    tasks: list[Task] = []
    dropped: list[str] = []
    seen: set[str] = set()
    for problem in problems:
        _check_problem(problem, seen)
        prompt = _prompt(problem, tokenizer, template, system)
        if not prompt:
            raise ValueError(
                f"problem {problem.id!r} has no prompt tokens: the tokenizer knows none of {problem.text[:60]!r}"
            )
        if limit is not None and len(prompt) > limit:
            if on_long == "error":
                raise ValueError(
                    f"the prompt of problem {problem.id!r} has {len(prompt)} tokens, the limit is {limit}: "
                    'raise the limit, shorten the problem, or pass on_long="drop" to leave such problems out'
                )
            dropped.append(problem.id)
            continue
        shown = tuple(_demonstration(problem, text, tokenizer) for text in problem.demonstrations)
        tasks.append(Task(problem.id, tuple(prompt), problem.text, problem.answer, shown, problem.extra))
    if dropped:
        warnings.warn(
            f"left out {len(dropped)} of {len(seen)} problems with prompts above {limit} tokens, the first is {dropped[0]!r}",
            stacklevel=2,
        )
    return tasks


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


def _prompt(problem: Problem, tokenizer: Any, template: str | None, system: str | None) -> Sequence[int]:
    """Token ids of the prompt, generation prompt included."""
    if template is None and getattr(tokenizer, "chat_template", None):
        messages = list(problem.messages or ({"role": "user", "content": problem.text},))
        if system is not None and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system})
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    # str.replace, not str.format: templates and problems are full of LaTeX braces
    text = problem.text if template is None else template.replace("{problem}", problem.text)
    ids = list(tokenizer(text).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text with EOS; a prompt must stay open
    return ids


def _demonstration(problem: Problem, text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a worked solution, with one EOS at the end."""
    if not text.strip():
        raise ValueError(
            f"problem {problem.id!r} has an empty demonstration: remove it, or check the column it is read from"
        )
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return tuple(ids)
