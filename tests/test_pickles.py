"""Whatever may cross to another process is plain: each part of each shipped recipe comes back from a pickle as it went, there too."""

from __future__ import annotations

import pickle
import subprocess
import sys
from array import array
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from ramulus.engine.engine import Request, Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.run.config.describe import to_json, to_python
from ramulus.run.config.find import FOLDER, shipped, stages_of, variants
from ramulus.run.signals import SHIPPED

RECIPES = [f"{name}:{function}" for name in shipped() for function in variants(FOLDER / f"{name}.py")]

ELSEWHERE = """
import pickle, sys
from ramulus.engine.engine import Request, Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.run.config.describe import to_python
for run in pickle.load(sys.stdin.buffer):
    print(to_python(run))
"""



def parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything that is nested in a value, the innermost first, and where it stands."""
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from parts(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from parts(item, f"{path}.{i}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from parts(item, f"{path}[{key!r}]")
    yield path, value


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_part_of_a_recipe_comes_back_as_it_went(recipe: str) -> None:
    seen = 0
    for run in stages_of(recipe):
        for path, part in parts(run, run.name):
            copy = again(part)
            assert type(copy) is type(part), path
            assert copy == part, path
            assert to_json(copy) == to_json(part), path
            seen += is_dataclass(part)
    assert seen > 10


@pytest.mark.slow
def test_they_come_back_in_another_process() -> None:
    runs = [run for recipe in RECIPES for run in stages_of(recipe)]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=pickle.dumps(runs), capture_output=True, check=True)
    assert done.stdout.decode() == "".join(to_python(run) + "\n" for run in runs)


@pytest.mark.parametrize("signal", SHIPPED, ids=lambda signal: type(signal).__name__)
def test_shipped_signals(signal: object) -> None:
    assert again(signal) == signal


def test_problems_of_a_source_that_has_been_read() -> None:
    source = stages_of("quickstart")[0].tasks
    problems = source()
    assert len(problems) > 100
    assert again(problems) == problems
    assert again(source) == source


def never(tokens: list[int]) -> str | None:
    """Ends nothing."""
    return None


@pytest.mark.parametrize("recipe", RECIPES)
def test_requests_of_a_recipe(recipe: str) -> None:
    for run in stages_of(recipe):
        sampling = Sampling(run.response_limit, run.temperature, run.top_p, run.top_k, run.min_p)
        request = Request(prefix=(1, 2), sampling=sampling, seed=3, until=never)
        assert again(request) == request


def test_a_segment() -> None:
    request = Request(prefix=(1, 2), sampling=Sampling(8, top_p=0.9), seed=3, until=never)
    segment = ToyEngine(vocab=6).continuation(request)
    assert isinstance(segment.kept, array)
    assert len(segment.tokens) == 8
    assert again(segment) == segment
