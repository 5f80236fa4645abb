"""Find a recipe, shipped or your own, and read the stages it describes."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramify.run.recipe import Run


def shipped() -> dict[str, str]:
    """The shipped recipes and the first sentence of each; reads their text and imports none."""
    folder = Path(__file__).parent.parent / "recipes"
    files = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in files}


def find(recipe: str) -> ModuleType:
    """The module of a shipped recipe, or of a file of your own; its folder is not put on the import path."""
    if recipe.endswith(".py"):
        path = Path(recipe)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no recipe at {recipe}: give the path of a Python file with a function recipe(), or one of {', '.join(shipped())}"
            )
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their annotations up here
        spec.loader.exec_module(module)
        return module
    if recipe not in shipped():
        close = difflib.get_close_matches(recipe, shipped(), n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"there is no recipe {recipe!r}.{guess} There are {', '.join(shipped())}, or give the path of a .py file"
        )
    return importlib.import_module(f"ramify.recipes.{recipe}")


def stages_of(recipe: str) -> tuple[Run, ...]:
    """What the recipe's `recipe()` returns, always as a tuple of stages."""
    from ramify.run.recipe import Run

    build: Callable[[], Any] | None = getattr(find(recipe), "recipe", None)
    if build is None:
        raise ValueError(
            f"the recipe {recipe} has no function recipe(): define one that returns a Run, or a tuple of Runs for stages"
        )
    made = build()
    stages = made if isinstance(made, tuple) else (made,)
    wrong = [stage for stage in stages if not isinstance(stage, Run)]
    if wrong or not stages:
        raise ValueError(f"recipe() in {recipe} must return a Run or a tuple of Runs, got {made!r:.80}")
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError(f"two stages of {recipe} have the same name: {', '.join(stage.name for stage in stages)}")
    return stages
