"""Every field of a recipe with its type, its value and its comment in the source: `ramulus train RECIPE --help`."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ramulus.core.recipe_part import is_part
from ramulus.run.config.describe import to_python
from ramulus.run.config.find import stages_of
from ramulus.run.config.override import override, word_of
from ramulus.run.config.recipe import Run
from ramulus.run.config.values import describe, field_types, free, has_text, options_of

FieldRow = tuple[str, str, str, str]
"""(dotted path, type, value, comment) of a field."""

WRITTEN_AS = {
    "model": "a folder, a hub name or a run", "tasks": "FILE,FILE..., gym:NAME, chain or sums", "evals": "as tasks, or None",
    "rewards": "NAME or FILE.py:NAME, several with commas", "lora": "a rank, true or None", "answer": "true or None", "repetition": "true or None",
    "final_evaluation": "true or None",
}  # fmt: skip
"""What is written for a field that holds an object, beside its parts."""


def field_rows(thing: Any, where: str = "") -> Iterator[FieldRow]:
    """The fields of a part and of the parts in it, in order; one that holds an object is followed by its fields."""
    kind_of: Any = type(thing)
    hints, comments = field_types(kind_of), comments_of(kind_of)
    for field in fields(thing):
        if not field.init or not field.repr:
            continue
        value, path = getattr(thing, field.name), f"{where}.{field.name}" if where else field.name
        hint, word = hints.get(field.name, Any), word_of(field)
        kind = WRITTEN_AS.get(path) or _type_of(value, hint)
        comment = comments.get(field.name, "")
        if is_part(value):
            yield path, kind, type(value).__name__, comment or _first_line(type(value))
            yield from field_rows(value, path)
        elif isinstance(value, tuple) and any(map(is_part, value)):
            yield path, kind, f"{len(value)} of them", comment
            for i, item in enumerate(value):
                yield f"{path}.{i}", "an object", type(item).__name__, _first_line(type(item))
                yield from field_rows(item, f"{path}.{i}")
        else:
            yield path, kind, _short(value), comment
            if value is None and word.usual is not None and where == "":
                yield f"{path}.*", "", "", f"fields of {word.usual.__name__}: {', '.join(f.name for f in fields(word.usual) if f.init)}"


def field_tables(stages: Sequence[Run]) -> Iterator[Table]:
    """A table of the fields of every stage."""
    for stage in stages:
        title = None if len(stages) == 1 else f"stage {stage.name}; {stage.name}.FIELD sets a field in it alone"
        table = Table(box=None, title=title, title_justify="left", pad_edge=False, header_style="bold")
        for name in ("field", "type", "default", "what it is"):
            table.add_column(name, overflow="fold", ratio=2 if name == "what it is" else None)
        for row in field_rows(stage):
            table.add_row(*map(escape, row))
        yield table


def _type_of(value: Any, hint: Any) -> str:
    """The values that the command line takes, in words."""
    options = options_of(hint)
    if Any in options:
        options = free(value) if has_text(hint) and value is not None and not is_dataclass(value) else []
    plain = [option for option in options if has_text(option) or option is type(None)]
    return describe(plain) if any(option is not type(None) for option in plain) else "an object"


def _short(value: Any) -> str:
    """A value in a few words."""
    text = value if isinstance(value, str) and value and len(value) < 40 else to_python(value, width=10_000)
    return text if len(text) <= 40 else text[:37] + "..."


def _first_line(kind: type) -> str:
    """What a class is, by the first line of its docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0].replace("`", "")


@cache
def comments_of(kind: type) -> dict[str, str]:
    """The comment on each field of a dataclass: at its end, or on the lines above it; of inherited fields too."""
    comments: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if is_dataclass(one):
            comments |= _written(one)
    return comments


def _written(kind: type) -> dict[str, str]:
    """The comments in the text of one class; none where its source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
        (body,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    lines, comments = source.splitlines(), {}
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            inside = [by_line[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in by_line]
            above: list[str] = []
            n = node.lineno - 1
            while n in by_line and lines[n - 1].lstrip().startswith("#"):
                above.insert(0, by_line[n])
                n -= 1
            comments[node.target.id] = " ".join(text for text in inside or above if not text.startswith("fmt:"))
    return comments


def show_fields(recipe: str, overrides: Sequence[str], console: Console) -> int:
    """Print all fields of a recipe as they are with these overrides."""
    stages = override(stages_of(recipe), list(overrides))
    words = f"usage: ramulus train {recipe} FIELD=VALUE ... [--config FILE.yaml] [--dry-run] [--resume | --fresh]"
    console.out(words, highlight=False)
    for table in field_tables(stages):
        console.print()
        console.print(table, highlight=False)
    line = "\nFIELD.PART=VALUE sets a part of an object (optimizer.lr=1e-6, mix.terms.0.coefficient=2); `ramulus train --help` explains the flags."
    console.out(line, highlight=False)
    return 0
