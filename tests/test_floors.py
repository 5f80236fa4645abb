"""The rooms and floors: who may import whom, where torch stays out, and one file for every optional library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "ramulus"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS: dict[str, set[str]] = {
    "models": set(),
    "native": set(),
    "core": set(),
    "engine": {"native", "models"},
    "tasks": {"core"},
    "grow": {"core", "engine"},
    "learn": {"core", "native", "models"},
    "look": {"core", "engine", "tasks", "grow"},
    "run": {"native", "models", "core", "engine", "tasks", "grow", "learn", "look"},
    "adapters": {"core", "engine", "grow", "learn", "look", "run"},
    "recipes": {"core", "models", "engine", "tasks", "grow", "learn", "look", "run", "adapters", "__init__"},
}
FLOORS["cli"] = FLOORS["__main__"] = {*FLOORS, "cli", "__init__"}
FLOORS["__init__"] = {*FLOORS} - {"cli", "__main__"}

SUB_ROOMS: dict[str, tuple[str, ...]] = {
    "engine": ("local", "remote", "vllm"),
    "learn": ("batch", "advantage", "objective", "packing", "attention", "policy", "sharded"),
    "look": ("evaluation", "compare", "cost", "viewer"),
    "run": ("config", "memory", "evaluation", "sweep"),
}
"""The sub-rooms of a room from the ground up: each imports only those before it. Modules that lie in none may be anywhere, in no circle."""

WITHOUT_TORCH = (
    "native/", "core/", "tasks/", "grow/", "engine/engine.py", "engine/stops.py", "engine/toy.py", "engine/remote/", "engine/vllm/",
    "recipes/", "__init__.py",
)  # fmt: skip
"""Torch may be imported inside their functions at most, and in core and in tasks not even there."""

OPTIONAL: dict[str, str | tuple[str, ...]] = {
    "orjson": "run/runtime.py",
    "math_verify": "tasks/math.py",
    "reasoning_gym": "tasks/gym.py",
    "datasets": "tasks/rows.py",
    "pyarrow": "tasks/rows.py",
    "peft": "learn/policy/lora.py",
    "torchao": "learn/sharded/optimizer.py",
    "tensorboard": "run/trackers.py",
    "wandb": "run/trackers.py",
    "trackio": "run/trackers.py",
    "mlflow": "run/trackers.py",
    "cloudpickle": ("tasks/workers.py", "learn/policy/children.py"),
    "pandas": ("run/result.py", "run/trackers.py"),
    "ray": "run/cluster.py",
    "vllm": (),  # it has processes of its own
    "trl": "adapters/trl.py",
    "tensordict": "adapters/exports.py",
    "msgspec": "adapters/exports.py",
    "verl": "adapters/verl.py",
    "lm_eval": "run/evaluation/lm_eval_tasks.py",
    "matplotlib": "look/compare/plots.py",
    "httpx2": "engine/remote/client.py",
    "starlette": ("engine/remote/listen.py", "engine/remote/server.py", "look/viewer/viewer.py"),
    "uvicorn": "engine/remote/listen.py",
}
"""Libraries that only some users install, and the one file that imports each (of a web framework: each application), inside a function."""


@dataclass(frozen=True)
class Import:
    """One import: of what, on which line, and whether it runs when the module is imported."""

    module: str  # with its dots
    line: int
    eager: bool


def imports(source: str, room: str = "") -> Iterator[Import]:
    """Every import of a module's source: at the top, inside functions, under TYPE_CHECKING, or by import_module("...")."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while pending:
        node, eager = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            eager = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, eager) for child in node.orelse]
            pending += [(child, False) for child in node.body]
            continue
        pending += [(child, eager) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["ramulus", room][: 2 - (node.level - 1)] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            package = module in ("ramulus", "torch.utils") or (module.startswith("ramulus.") and (PACKAGE.parent / module.replace(".", "/")).is_dir())
            if package:  # what is taken from there is the module
                yield from (Import(f"{module}.{alias.name}", node.lineno, eager) for alias in node.names)
            else:
                yield Import(module, node.lineno, eager)
        elif (name := imported_by_call(node)) is not None:
            yield Import(name, getattr(node, "lineno", 0), eager)


def imported_by_call(node: ast.AST) -> str | None:
    """The module that `import_module("...")` names."""
    match node:
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            return name if ast.unparse(func).split(".")[-1] in ("import_module", "__import__") else None
    return None


def library(module: str) -> str:
    """The library that a module belongs to."""
    return "tensorboard" if module.startswith("torch.utils.tensorboard") else module.split(".")[0]


def breaches(place: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `place` (relative to the package)."""
    room = place.split("/")[0].removesuffix(".py")
    found = []
    for imported in imports(source, room):
        name, where = library(imported.module), f"{place}:{imported.line} imports {imported.module}"
        if name == "ramulus":
            target = [*imported.module.split("."), "__init__"][1]
            target = target if target in FLOORS else "__init__"  # a public name
            if target != room and target not in FLOORS.get(room, set()):
                found.append(f"{where}: {room} stands on {sorted(FLOORS.get(room, set()))} only")
        elif room == "core" and name not in sys.stdlib_module_names:
            found.append(f"{where}: core needs the standard library only")
        elif name == "torch" and place.startswith(WITHOUT_TORCH) and (imported.eager or place.startswith("tasks/")):
            found.append(f"{where}: no torch here")
        elif name in OPTIONAL and (place not in at_home(name) or imported.eager):
            found.append(f"{where}: only {OPTIONAL[name]} imports it, inside a function")
    return found


def at_home(name: str) -> tuple[str, ...]:
    """The files that import an optional library."""
    files = OPTIONAL[name]
    return (files,) if isinstance(files, str) else files


def place_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=place_of)
def test_imports_go_downward_only(file: Path) -> None:
    assert breaches(place_of(file), file.read_text()) == []


def test_every_room_has_a_floor() -> None:
    rooms = {place_of(file).split("/")[0].removesuffix(".py") for file in FILES}
    assert rooms <= FLOORS.keys()
    inside = {place_of(file).rpartition("/")[0] for file in FILES if place_of(file).count("/") > 1}
    assert inside == {f"{room}/{part}" for room, parts in SUB_ROOMS.items() for part in parts}


IMPLEMENTATIONS = (
    "engine.local", "engine.remote", "engine.vllm", "engine.toy", "learn.policy.torch_learner", "learn.policy.torch_policy",
    "learn.policy.in_process", "learn.policy.separate", "learn.sharded",
)  # fmt: skip
"""What engines and learners are made of. A run knows their protocols, and what factories say of them (`engine/factory.py`, `learn/factory.py`)."""

MEETING = frozenset({"learn.sharded.world", "learn.sharded.starting", "learn.sharded.joining"})
"""How processes that torchrun or a cluster has started become the ranks of a learner: whoever places them knows this, and not what they compute."""

KNOWN = {
    "run/config/recipe.py": {"engine.local.factory", "learn.policy.torch_learner"},  # what a recipe has that names no engine or no learner
    "run/config/words.py": {"learn.policy.torch_learner", "learn.sharded.factory"},  # what `learner=torch` and `learner=sharded` stand for
    "run/serve.py": {"engine.remote.factory", "engine.remote.listen", "engine.remote.server", "engine.toy"},  # serves an engine to other processes
    "run/diagnosis.py": {"engine.local.factory", "learn.policy.torch_policy"},  # says what these two make of a model
}
"""What each file of run may know of them nevertheless, and why."""


def known_to(source: str) -> set[str]:
    """The implementations of engines and learners that a module imports."""
    modules = {one.module.removeprefix("ramulus.") for one in imports(source) if one.module.startswith("ramulus.")}
    return {name for name in modules if any(f"{name}.".startswith(f"{part}.") for part in IMPLEMENTATIONS)} - MEETING


PROBED = {
    "engine/factory.py": ["getattr(factory, 'traits', EngineTraits())"],
    "learn/factory.py": ["getattr(factory, 'traits', LearnerTraits())"],
    "run/dry_run.py": ["getattr(self.learner, name)"],
}
"""Where one is asked nevertheless: for the one attribute that a factory may leave out; and by what stands around a learner and hands on any name."""


def probes(source: str) -> list[str]:
    """Where an engine, a learner or the factory of one is asked for its class, or for an attribute that it may not have."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 1)
    asked = [node for node in calls if ast.unparse(node.func) in ("isinstance", "getattr", "hasattr")]
    whose = ("engine", "learner", "factory")
    return [ast.unparse(node) for node in asked if ast.unparse(node.args[0]).rpartition(".")[2] in whose]


def test_a_run_knows_no_implementation_of_an_engine_or_a_learner() -> None:
    files = {place_of(file): file.read_text() for file in FILES if place_of(file).startswith("run/")}
    assert {place: known for place, source in files.items() if (known := known_to(source))} == KNOWN


def test_nobody_asks_an_engine_or_a_learner_for_its_class() -> None:
    assert {place_of(file): asked for file in FILES if (asked := probes(file.read_text()))} == PROBED


def test_a_run_that_knows_one_is_seen() -> None:
    assert known_to("def f():\n    from ramulus.engine.local import kv") == {"engine.local.kv"}
    assert known_to("from ramulus.learn.sharded.share import pieces\nfrom ramulus.learn.sharded.world import World") == {"learn.sharded.share"}
    assert known_to("from ramulus.engine.factory import engine_traits") == set()
    for probe in ("isinstance(run.engine, Vllm)", "getattr(run.learner, 'sharing', None)", "hasattr(built.factory, 'traits')",
                  "isinstance(engine, ScoredEngine)", "isinstance(learner, InProcess)", "getattr(factory, 'ranks', 1)"):  # fmt: skip
        assert probes(probe) == [probe]
    assert probes("isinstance(model, Pretrained) or getattr(engine_memory, 'slots', 0)") == []


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves."""
    found = []
    for start in arrows:
        seen: set[str] = set()
        pending = [*arrows[start]]
        while pending:
            module = pending.pop()
            if module not in seen:
                seen.add(module)
                pending += arrows.get(module, ())
        found += [start] if start in seen else []
    return found


def within(room: str) -> dict[str, set[str]]:
    """Which modules of a room each of its modules imports."""
    names = {f"ramulus.{place_of(file).removesuffix('.py').replace('/', '.')}": file for file in FILES if place_of(file).startswith(f"{room}/")}
    return {name: {one.module for one in imports(file.read_text(), room)} & names.keys() - {name} for name, file in names.items()}


def below(importer: str, imported: str, order: tuple[str, ...]) -> bool:
    """Whether a module of a room may import another, by their sub-rooms."""
    one, other = (name.split(".")[2] if name.count(".") > 2 else None for name in (importer, imported))
    return one is None or other is None or order.index(other) <= order.index(one)


@pytest.mark.parametrize("room", ["core", "native", "models", "engine", "tasks", "grow", "learn", "look", "run"])
def test_the_arrows_of_a_room_go_downward(room: str) -> None:
    arrows = within(room)
    order = SUB_ROOMS.get(room, ())
    assert [(one, other) for one in arrows for other in arrows[one] if not below(one, other, order)] == []
    assert circles(arrows) == []


def test_a_circle_and_an_arrow_upward_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert not below("ramulus.learn.batch.layout", "ramulus.learn.packing.pack", SUB_ROOMS["learn"])
    assert below("ramulus.learn.packing.pack", "ramulus.learn.batch.layout", SUB_ROOMS["learn"])


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/tree.py", "import numpy"),
        ("core/tree.py", "from ramulus.engine import engine"),
        ("core/tree.py", "def f():\n    import torch"),
        ("core/store.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ramulus.run.config.recipe import Run"),
        ("core/tree.py", "from ..grow import growth"),
        ("engine/local/local_engine.py", "from ramulus.core.tree import Tree"),
        ("engine/toy.py", "import torch"),
        ("engine/toy.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("engine/toy.py", "from torch import nn"),
        ("grow/growth.py", "from ramulus.learn.batch.tree_batch import Credits"),
        ("grow/growth.py", "class A:\n    from torch import Tensor"),
        ("learn/packing/pack.py", "def f():\n    from ramulus.grow.stop import Stop"),
        ("learn/packing/pack.py", "import importlib\nimportlib.import_module('ramulus.grow.stop')"),
        ("learn/packing/pack.py", "from ramulus import Stop"),
        ("look/cost/ledger.py", "import ramulus.learn.batch.tree_batch"),
        ("run/trainer.py", "from ramulus import cli"),
        ("run/trainer.py", "from ramulus.cli import main"),
        ("tasks/math.py", "import math_verify"),
        ("tasks/gym.py", "def f():\n    import math_verify"),
        ("tasks/chain.py", "def f():\n    import torch"),
        ("run/trainer.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
        ("run/trainer.py", "def f():\n    from torch.utils import tensorboard"),
        ("recipes/grpo.py", "from ramulus.cli import main"),
        ("attic/old.py", "from ramulus.core import tree"),
    ],
)
def test_a_breach_is_seen(place: str, source: str) -> None:
    assert breaches(place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/store.py", "import json\nfrom ramulus.core.tree import Tree\nfrom .task import Task"),
        ("engine/local/local_engine.py", "import torch\nfrom ramulus.engine.engine import Segment"),
        ("tasks/math.py", "def f():\n    import math_verify"),
        ("run/trackers.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
        ("recipes/grpo.py", "from ramulus import Star\nfrom ramulus.run.config.recipe import Run"),
        ("cli.py", "from ramulus.recipes import grpo\nfrom ramulus import __version__"),
    ],
)
def test_what_is_allowed_passes(place: str, source: str) -> None:
    assert breaches(place, source) == []


def loaded(code: str) -> set[str]:
    """The top modules that are loaded after this code ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_ramulus_loads_no_library() -> None:
    names = loaded("import ramulus; ramulus.__version__; ramulus.__all__; from ramulus import Tree, Author")
    assert names.isdisjoint({"torch", "numpy", "transformers", "tyro", "rich", *OPTIONAL})
    assert "torch" in loaded("import torch"), "the check could not fail"


def test_rooms_without_torch_load_without_it() -> None:
    parts = [place_of(file) for file in FILES if place_of(file).startswith(WITHOUT_TORCH[:5])]
    modules = [f"ramulus.{part.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for part in parts]
    names = loaded("\n".join(f"import {module}" for module in modules if not module.endswith("_main")))
    assert names.isdisjoint({"torch", "transformers", *OPTIONAL})
