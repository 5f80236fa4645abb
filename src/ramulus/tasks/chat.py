"""Chats as prompts: a tokenizer's template with its arguments and date, what it refuses in one sentence, and how it ends an assistant's turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

_OPENED: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
_RESERVED = ("messages", "conversation", "chat_template", "continue_final_message", "strftime_now", *_OPENED)  # what is not an argument of a template
_DATED = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")  # how templates ask for the date
_SAID = "42 apples"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with further `arguments` that it reads and the `date` (YYYY-MM-DD) that it may write; "" is today.

    Raises ValueError for arguments that it does not read, and for a date that is none.
    """

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        for name in self.arguments:
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", self.text):
                raise ValueError(
                    f"template_arguments has {name!r}, which the chat template of {self.name!r} does not read: leave it out, or mend its name"
                )
        if self.date:
            day_of(self.date)

    @property
    def name(self) -> str:
        """What the tokenizer is called."""
        return name_of(self.tokenizer)

    @property
    def text(self) -> str:
        """The source of the template, in Jinja."""
        return str(self.tokenizer.get_chat_template())

    def prompts(self, chats: Sequence[Messages], ids: Sequence[str]) -> list[list[int]]:
        """Token ids of the chats of these problems, generation prompt included; ValueError where the template refuses one."""
        try:
            return [list(prompt) for prompt in self.render(chats, **_OPENED)]
        except ImportError:
            raise
        except Exception as error:  # a template is a program of somebody else's, which may raise anything
            raise ValueError(self.refusal(chats, ids, error)) from error

    def render(self, chats: Any, **options: Any) -> Any:
        """What the tokenizer makes of chats, or of a single one."""
        given = dict(self.arguments)
        if self.date and _DATED.search(self.text):
            day = day_of(self.date)
            given["chat_template"] = _DATED.sub(lambda asked: json.dumps(day.strftime(asked[1][1:-1])), self.text)
        return self.tokenizer.apply_chat_template(list(chats), **given, **options)

    def refusal(self, chats: Sequence[Messages], ids: Sequence[str], error: Exception) -> str:
        """Why the chats could not be rendered: which of them, and what to do."""
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            return (
                f"the chat template of {self.name!r} has an error in line {error.lineno}: {error.message}; mend it in chat_template.jinja or "
                "tokenizer_config.json, or write the prompts yourself with template=..."
            )
        for chat, name in zip(chats, ids, strict=True):
            try:
                self.render([chat], **_OPENED)
            except Exception as refused:
                roles = ", ".join(str(message["role"]) for message in chat)
                wanted = "leave the system message out, or put its text before {problem} in " if "system" in roles else "mend its messages, or write "
                return (
                    f"the chat template of {self.name!r} refuses the chat of problem {name!r} (roles: {roles}): {one_line(refused)}; "
                    f"{wanted}template=..."
                )
        return f"the chat template of {self.name!r} refuses the problems: {one_line(error)}; write the prompts yourself with template=..."

    def left_out(self, roles: Sequence[str]) -> list[int]:
        """Which messages of a chat of such roles the template leaves out, and says nothing."""
        texts = [f"{i:04d} apples." for i in range(len(roles))]
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            written = self.render(chat, tokenize=False, add_generation_prompt=True)
        except Exception:  # it says something: `prompts` will tell
            return []
        return [i for i, text in enumerate(texts) if text not in written]

    def turn_end(self) -> int | None:
        """The token that the template writes behind an assistant's text; None where that is text like any other, or nothing."""
        chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": _SAID}]
        try:
            _, mark, tail = self.render(chat, tokenize=False, add_generation_prompt=False).rpartition(_SAID)
        except Exception:  # it renders no such chat, so it says nothing of ends
            return None
        ids = self.tokenizer(tail.lstrip(), add_special_tokens=False).input_ids if mark and tail.strip() else []
        known = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return int(ids[0]) if ids and ids[0] in known else None


def chat_template(tokenizer: Any, arguments: Mapping[str, Any] | None = None, date: str = "") -> ChatTemplate | None:
    """The chat template of a tokenizer, if it has one."""
    return ChatTemplate(tokenizer, arguments or {}, date) if getattr(tokenizer, "chat_template", None) else None


def arguments_of(text: str | None) -> dict[str, Any] | None:
    """Arguments of a chat template from JSON; ValueError for what is no object."""
    try:
        arguments = None if text is None else json.loads(text)
    except json.JSONDecodeError:
        arguments = text
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"--template-arguments is a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}")
    return arguments


def name_of(tokenizer: Any) -> str:
    """What to call a tokenizer."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def day_of(date: str) -> datetime:
    """Noon of a day written YYYY-MM-DD; ValueError for another text."""
    try:
        return datetime.strptime(f"{date} 12", "%Y-%m-%d %H")
    except ValueError:
        raise ValueError(f"date={date!r} is no day: write it as 2026-01-31") from None


def today() -> str:
    """The local date of this machine as YYYY-MM-DD."""
    return datetime.now().date().isoformat()


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return text if text else type(error).__name__


def content_text(content: Any, where: str) -> str:
    """The text of a message, whose content is text, a list of parts of text, or nothing; ValueError for other parts, by their type."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list | tuple) else [content]
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text" if isinstance(part, str) else type(part).__name__
        if kind != "text" or not isinstance(part if isinstance(part, str) else part.get("text"), str):
            raise ValueError(f"{where}: a message holds a part of type {kind!r} that is no text, and only text can be read: leave such rows out")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)
