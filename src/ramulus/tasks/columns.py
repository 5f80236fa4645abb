"""What the columns of one row mean: prompts, answers and demonstrations in the shapes that data sets write them."""

from __future__ import annotations

import base64
import json
from datetime import date, time
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ramulus.tasks.chat import content_text


def is_verl(row: dict[str, Any]) -> bool:
    graded = row.get("reward_model")
    return "prompt" in row and isinstance(graded, dict) and "ground_truth" in graded


def field_of(row: dict[str, Any], column: str, where: str) -> Any:
    """A column by its name, or by a dotted path into nested fields and lists."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"{where}: no column {column!r}: name one of {', '.join(_paths(row))}")
    return value


def _paths(row: dict[str, Any]) -> list[str]:
    """Names of the columns, with those one level inside."""
    paths: list[str] = []
    for name, value in row.items():
        paths.extend([f"{name}.{inner}" for inner in value] if isinstance(value, dict) and value else [name])
    return paths


LOST = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "videos", "audio")
"""What a message may hold beside its role and content that a chat template would write."""
KEPT_BESIDE = ("name", "tool_call_id")  # what a message may hold that is kept beside its role and content
MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # columns of what marks in the prompt stand for


def is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in value)
    )


def read_prompt(value: Any, where: str, column: str, split: bool = False) -> tuple[tuple[dict[str, str], ...] | None, str, str | None]:
    """The chat, if it is one, the text of its user, and the assistant's turn at its end where it is to be `split` off.

    ValueError for a chat that ends with one and is not split: the solution would stand in the prompt.
    """
    messages = tuple(_turn(m, where) for m in value) if is_chat(value) else None
    last = None
    if messages is not None and messages[-1]["role"] == "assistant":
        if not split:
            raise ValueError(
                f"{where}: the chat in column {column!r} ends with an assistant's turn, which is an answer and no prompt: learn from it with "
                f"tasks.demonstration={column}, or cut it off"
            )
        last, messages = messages[-1]["content"], messages[:-1]
    if messages is None and not isinstance(value, str) and value not in (None, []):
        raise ValueError(
            f"{where}: column {column!r} holds a {type(value).__name__}, a prompt is text or a list of role and content"
        )
    text = value or "" if messages is None else "\n\n".join(m["content"] for m in messages if m["role"] == "user")
    if not text or not text.strip():
        raise ValueError(f"{where}: column {column!r} is an empty prompt: remove the row, or name another column")
    return messages, text, last


def _turn(message: dict[str, Any], where: str) -> dict[str, str]:
    """A message with its text, and what else of it a chat template may write."""
    named = {name: message[name] for name in KEPT_BESIDE if isinstance(message.get(name), str) and message[name]}
    return {"role": message["role"], "content": _turn_text(message, where), **named}


def _turn_text(message: dict[str, Any], where: str) -> str:
    """The text of a message; ValueError where more than text would be lost."""
    for name in LOST:
        if message.get(name):
            raise ValueError(
                f"{where}: a message of the role {message['role']!r} has {name!r}, {str(message[name])[:60]!r}, and only its content is read: "
                "write it into the content, or leave such rows out"
            )
    return content_text(message["content"], where)


def check_media(row: dict[str, Any], prompt: str, where: str, verl: bool) -> None:
    """Raise ValueError for a row whose prompt goes with images, videos or sound in another column: one with a mark such as <image>, or of verl's."""
    for name in MEDIA:
        if row.get(name) not in (None, "", [], {}) and (f"<{name.removesuffix('s')}>" in prompt or (verl and name.endswith("s"))):
            raise ValueError(f"{where}: the prompt goes with the {name} of column {name!r}, and only text can be read: leave such rows out")


def read_answers(value: Any, where: str, column: str) -> tuple[str, ...]:
    """Every reference in a column: text, bytes of text, numbers, booleans, or a list of them; null, NaN and blank text are none."""
    values = value if isinstance(value, list | tuple) else [value]
    answers = [spelled(item) for item in values]
    if any(item is None for item in answers):
        raise ValueError(
            f"{where}: column {column!r} holds {str(value)[:60]!r}, an answer is text, a number or a list of them"
        )
    return tuple(item for item in answers if item and item.strip())


def spelled(value: Any) -> str | None:
    """An answer as text; "" where there is none, None where it is no answer."""
    if value is None or (isinstance(value, float | Decimal) and value != value):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, bool):
        return json.dumps(value)
    return str(value) if isinstance(value, str | int | float | Decimal | Fraction | date) else None


def read_demonstrations(value: Any, where: str, column: str) -> tuple[str, ...]:
    if is_chat(value):
        value = [_turn_text(m, where) for m in value if m["role"] == "assistant"]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(
            f"{where}: column {column!r} holds {str(value)[:60]!r}, a demonstration is text, a list of texts or a chat"
        )
    return tuple(values)


def plain(value: Any, where: str, column: str) -> Any:
    """The value as plain JSON, which the store keeps: bytes and dates as text, NaN as null; raises ValueError for what has no such form."""
    try:
        return json.loads(json.dumps(value, default=_as_json), parse_constant=lambda name: None)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: column {column!r} holds a {type(value).__name__}, only plain JSON can be kept with a task: leave that column out of `keep`"
        ) from None


def _as_json(value: Any) -> Any:
    """What JSON has no form for."""
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, date | time | Decimal):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    raise TypeError(type(value).__name__)
