"""The pictures of methods.md are those that docs/pictures.py draws now."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def drawn():
    """What docs/pictures.py draws, by file name."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return {f"{name}.svg": scene.draw() for name, scene in module.scenes().items()}


def test_they_are_up_to_date(drawn: dict[str, str]) -> None:
    kept = {file.name: file.read_text() for file in (DOCS / "pictures").glob("*.svg")}
    assert kept.keys() == drawn.keys()
    stale = [name for name in kept if kept[name] != drawn[name]]
    assert not stale, "run `python docs/pictures.py`, and look at what has changed"


def test_each_is_shown_where_its_method_is(drawn: dict[str, str]) -> None:
    text = (DOCS / "methods.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(pictures/([\w-]+\.svg)\)", text)
    assert sorted(shown) == sorted(drawn)


def test_they_say_what_the_method_does(drawn: dict[str, str]) -> None:
    """HPT learns from one side at a time: what is not learned from has no colour."""
    demonstration = re.compile(r'stroke-dasharray="9 2"><path d="[^"]*" stroke="(#\w+)"')
    rollouts = re.compile(r'stroke-width="[\d.]+"><path d="[^"]*" stroke="(#\w+)"')
    none = "#8886"
    assert demonstration.findall(drawn["hpt-solved.svg"]) == [none]
    assert none not in rollouts.findall(drawn["hpt-solved.svg"])
    assert none not in demonstration.findall(drawn["hpt-failed.svg"])
    assert set(rollouts.findall(drawn["hpt-failed.svg"])) == {none}
    assert none not in demonstration.findall(drawn["luffy.svg"]) + rollouts.findall(drawn["luffy.svg"])
