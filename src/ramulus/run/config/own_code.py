"""Digests of the code of a recipe's parts that is not ramulus' own: the same settings mean something else once it was changed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ramulus.core.recipe_part import everything_in


def code_digests(*things: Any) -> dict[str, str]:
    """Of each file of one's own that configurations use, by its name: a digest of the classes and functions that are in it, and of what those name.

    Comments, blank lines and definitions that nothing here reaches leave it as it is; a module beside that file counts whole. What was typed into
    a notebook has no file and is left out.
    """
    texts: dict[str, set[str]] = {}
    for file, name in {place for thing in things for _, value in everything_in(thing) for place in _places(value)}:
        for path, text in _reached(file, name):
            texts.setdefault(path.name, set()).add(text)
    return {name: blake2b("\n\n".join(sorted(own)).encode(), digest_size=8).hexdigest() for name, own in sorted(texts.items())}


def changed_code(before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    """The files whose code was changed between the digests of some stages and those of today; a file of one side alone is another setting."""
    pairs = zip(before, now, strict=False)
    return sorted({name for old, new in pairs for name in old.keys() & new.keys() if old[name] != new[name]})


def _places(value: Any) -> Iterator[tuple[Path, str]]:
    """File and outermost name of the code of a value: of the function that it is, or holds (`partial`), or of its class."""
    if callable(held := getattr(value, "func", None)):
        yield from _places(held)
    defined = value if hasattr(value, "__qualname__") else type(value)
    module = str(getattr(defined, "__module__", ""))
    file = getattr(sys.modules.get(module), "__file__", None)
    if file and module.split(".")[0] != "ramulus" and Path(file).is_file() and not _installed(Path(file)):
        yield Path(file), str(defined.__qualname__).split(".")[0]


def _installed(file: Path) -> bool:
    """Whether a file belongs to Python or to a package that was installed."""
    return bool({"site-packages", "dist-packages"} & set(file.parts)) or file.is_relative_to(Path(ast.__file__).parent)


def _reached(file: Path, name: str) -> Iterator[tuple[Path, str]]:
    """File and text of each statement that a name of a file needs; all of them where the name is bound nowhere, as that of a lambda."""
    with suppress(OSError, SyntaxError, ValueError):
        statements = ast.parse(file.read_text()).body
        bound = [_bound(statement) for statement in statements]
        wanted, taken = {name}, set[int]()
        while more := [i for i, names in enumerate(bound) if i not in taken and names & wanted]:
            taken.update(more)
            wanted |= {node.id for i in more for node in ast.walk(statements[i]) if isinstance(node, ast.Name)}
        for i in sorted(taken) or range(len(statements)):
            yield file, ast.unparse(statements[i])
            yield from _beside(file, statements[i])


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(statement) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return names | {(node.asname or node.name).split(".")[0] for node in ast.walk(statement) if isinstance(node, ast.alias)}


def _beside(file: Path, statement: ast.stmt) -> Iterator[tuple[Path, str]]:
    """Name and text of the modules that a statement imports from beside a file."""
    for node in ast.walk(statement):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            above = [node.module] if node.module else []
            names += above + [".".join([*above, alias.name]) for alias in node.names]  # what is imported may be a module itself
        for path in {file.parent.joinpath(*name.split(".")).with_suffix(".py") for name in names}:
            if path.is_file() and path != file:
                yield path, ast.unparse(ast.parse(path.read_text()))
