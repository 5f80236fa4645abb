"""Find a recipe, shipped or your own, and read the stages it describes: `grpo`, `grpo:small`, `mine.py`, `mine.py:small`, `run.yaml`."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
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


def yaml_of(recipe: str) -> tuple[str, str | None] | None:
    """The YAML file that is named in place of a recipe, and the recipe it is laid over where one is (run.yaml:grpo); None for any other recipe."""
    match = re.fullmatch(r"(.+\.ya?ml)(?::(.+))?", recipe)
    return (match[1], match[2]) if match else None


def split_name(recipe: str) -> tuple[str, str]:
    """`grpo:small` and `mine.py:small` as (recipe, function); without a colon the function is `recipe`."""
    name, colon, function = recipe.rpartition(":")
    return (name, function) if colon and function.isidentifier() else (recipe, USUAL)


def absolute(recipe: str) -> str:
    """The one way to write a recipe, the same from any folder: the full path where it is a file, no `:recipe` at the end."""
    if config := yaml_of(recipe):
        return str(Path(config[0]).resolve()) + (f":{absolute(config[1])}" if config[1] else "")
    name, function = split_name(recipe)
    name = str(Path(name).resolve()) if name.endswith(".py") else name
    return name if function == USUAL else f"{name}:{function}"


def find(recipe: str) -> ModuleType:
    """The module of a shipped recipe, or of a file of your own; its folder is not put on the import path."""
    check_named(recipe)
    return read_file(recipe, "") if recipe.endswith(".py") else importlib.import_module(f"ramulus.recipes.{recipe}")


def check_named(recipe: str) -> None:
    """Raise FileNotFoundError or ValueError for a recipe, or a variant of one, that is not there. Imports nothing."""
    if (config := yaml_of(recipe)) is not None:
        if not Path(config[0]).is_file():
            raise FileNotFoundError(f"there is no configuration at {config[0]}: `ramulus config RECIPE > {Path(config[0]).name}` writes one")
        if config[1]:
            check_named(config[1])
        return
    name, function = split_name(recipe)
    file = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if name.endswith(".py") and not file.is_file():
        remedy = f"give the path of a Python file with a function recipe(), or one of {', '.join(shipped())}"
        raise FileNotFoundError(f"there is no recipe at {name}: {remedy}")
    if not name.endswith(".py") and name not in shipped():
        close = difflib.get_close_matches(name, shipped(), n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"there is no recipe {name!r}.{guess} There are {', '.join(shipped())}, or give the path of a .py or a .yaml file"
        )
    try:
        there = variants(file)
    except (SyntaxError, UnicodeDecodeError):  # told, with its line, when the file is read
        return
    if function not in {USUAL, *there}:
        raise ValueError(no_function(name, function, there))


def no_function(name: str, function: str, there: dict[str, str]) -> str:
    """The sentence for a function that a recipe has not."""
    named = ", ".join(name if other == USUAL else f"{name}:{other}" for other in there)
    known = f"there is {named}" if there else "define one that returns a Run, or a tuple of Runs for stages"
    return f"the recipe {name} has no function {function}() that can be called without arguments: {known}"


def stages_of(recipe: str) -> tuple[Run, ...]:
    """What the named function of a recipe returns, `recipe()` where none is named; always as a tuple of stages."""
    from ramulus.run.config.recipe import Run

    if (config := yaml_of(recipe)) is not None:
        from ramulus.run.config.yaml_file import read_yaml

        check_named(recipe)
        return read_yaml(*config, stages_of)
    name, function = split_name(recipe)
    module = find(name)
    build: Callable[[], Any] | None = getattr(module, function, None)
    there = variants(Path(str(module.__file__)))
    if not callable(build) or function not in {USUAL, *there}:
        raise ValueError(no_function(name, function, there))
    with told_by_line(name, vars(module)):
        answer = build()
    stages = answer if isinstance(answer, tuple) else (answer,)
    wrong = [stage for stage in stages if not isinstance(stage, Run)]
    if wrong or not stages:
        raise ValueError(f"{function}() in {name} must return a Run or a tuple of Runs, got {answer!r:.80}")
    refuse_same_names(stages, recipe)
    return stages


def refuse_same_names(stages: tuple[Run, ...], of: str) -> None:
    """Raise ValueError where two stages have the same name, by which each is asked for."""
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"two stages of {of} have the same name: {', '.join(names)}; give each one of its own, Run(name=...)")
