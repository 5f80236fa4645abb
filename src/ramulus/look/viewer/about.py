"""What a list of runs says of a run, from its run.json and its files: recipe, model, seed, beginning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ramulus.look.curves import SEED


def seed_in(title: str) -> tuple[str | None, int | None]:
    """The title without the seed that a sweep's folder names, and the seed; (None, None) where it names none."""
    parts = title.split("/")
    seeds = [part for part in parts if SEED.fullmatch(part)]
    if not seeds:
        return None, None
    return "/".join(part for part in parts if part not in seeds), int(seeds[-1].rpartition("-")[2])


def recipe_name(saved: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The recipe as it was named, a file without its folders; of a run that does not say, the name of the stage."""
    recipe = saved.get("recipe")
    name = recipe.rpartition("/")[2] if isinstance(recipe, str) else config.get("name")
    return name if isinstance(name, str) else None


def model_name(model: Any) -> str | None:
    """A model for people: its name on the hub, the last part of its folder, or the kind of a new one."""
    inside = model if isinstance(model, dict) else {"path": model}
    path = inside.get("path")
    if not isinstance(path, str):
        return (model_name(inside["model"]) if "model" in inside else None) or str(inside.get("class", "")).rpartition(".")[2] or None
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", ".", "~")) else path


def started(saved: dict[str, Any], path: Path | None, written: float, seconds: float) -> float | None:
    """When a run began, seconds since the epoch: as it says, else by its files."""
    if isinstance(beginning := number_or(saved.get("started"), None), int | float):
        return float(beginning)
    files = [path.stat().st_mtime] if path is not None else []
    return min([*files, *([written - seconds] if written else [])], default=None)


def number_or(value: Any, usual: Any) -> Any:
    """The value where it is a number, else the usual one."""
    return value if isinstance(value, int | float) and math.isfinite(value) else usual
