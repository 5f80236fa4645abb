"""Find a recipe, shipped or your own, and read the stages it describes: `grpo`, `grpo:small`, `mine.py`, `mine.py:small`."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ramulus.run.config.python_file import read_file, told_by_line

if TYPE_CHECKING:
    from ramulus.run.config.recipe import Run

FOLDER = Path(__file__).parents[2] / "recipes"
USUAL = "recipe"  # the function that is meant where none is named


def shipped() -> dict[str, str]:
    """The shipped recipes and the first sentence of each; reads their text and imports none."""
    files = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    return {path.stem: first_line(ast.parse(path.read_text())) for path in files}


def variants(file: Path) -> dict[str, str]:
    """The functions of a recipe file that can build a run (public, without arguments) and the first line of each; imports nothing."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name: first_line(node) for node in functions if not node.name.startswith("_") and not wanted(node.args)}


def first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0]


def wanted(args: ast.arguments) -> int:
    """How many arguments have no default."""
    return len(args.posonlyargs + args.args) - len(args.defaults) + sum(default is None for default in args.kw_defaults)


def split_name(recipe: str) -> tuple[str, str]:
    """`grpo:small` and `mine.py:small` as (recipe, function); without a colon the function is `recipe`."""
    name, colon, function = recipe.rpartition(":")
    return (name, function) if colon and function.isidentifier() else (recipe, USUAL)


def absolute(recipe: str) -> str:
    """The one way to write a recipe, the same from any folder: the full path where it is a file, no `:recipe` at the end."""
    name, function = split_name(recipe)
    name = str(Path(name).resolve()) if name.endswith(".py") else name
    return name if function == USUAL else f"{name}:{function}"


def find(recipe: str) -> ModuleType:
    """The module of a shipped recipe, or of a file of your own; its folder is not put on the import path."""
    if recipe.endswith(".py"):
        return read_file(recipe, f"give the path of a Python file with a function recipe(), or one of {', '.join(shipped())}")
    if recipe not in shipped():
        close = difflib.get_close_matches(recipe, shipped(), n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"there is no recipe {recipe!r}.{guess} There are {', '.join(shipped())}, or give the path of a .py file"
        )
    return importlib.import_module(f"ramulus.recipes.{recipe}")


def stages_of(recipe: str) -> tuple[Run, ...]:
    """What the named function of a recipe returns, `recipe()` where none is named; always as a tuple of stages."""
    from ramulus.run.config.recipe import Run

    name, function = split_name(recipe)
    module = find(name)
    build: Callable[[], Any] | None = getattr(module, function, None)
    there = variants(Path(str(module.__file__)))
    if not callable(build) or function not in {USUAL, *there}:
        named = ", ".join(name if other == USUAL else f"{name}:{other}" for other in there)
        known = f"there is {named}" if there else "define one that returns a Run, or a tuple of Runs for stages"
        raise ValueError(
            f"the recipe {name} has no function {function}() that can be called without arguments: {known}"
        )
    with told_by_line(name, vars(module)):
        answer = build()
    stages = answer if isinstance(answer, tuple) else (answer,)
    wrong = [stage for stage in stages if not isinstance(stage, Run)]
    if wrong or not stages:
        raise ValueError(f"{function}() in {name} must return a Run or a tuple of Runs, got {answer!r:.80}")
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError(f"two stages of {recipe} have the same name: {', '.join(stage.name for stage in stages)}")
    return stages
