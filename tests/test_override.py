"""Overrides by dotted path: values and types that are taken, and the sentence for those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ramulus.run.config.override import override


@dataclass(frozen=True)
class Clip:
    low: float = 0.2
    high: float = 0.2


@dataclass(frozen=True)
class Term:
    mask: Any = Clip()
    coefficient: float = 1.0


@dataclass(frozen=True)
class Wide:
    width: int = 8
    branching: int = 2

    def __post_init__(self) -> None:
        if self.width < self.branching:
            raise ValueError(f"width={self.width} is below branching={self.branching}: raise width")


@dataclass(frozen=True)
class Small:
    name: str = "small"
    model: Callable[[], int] | str = Clip()
    branching: Any = field(default_factory=Wide)
    terms: tuple[Term, ...] = (Term(), Term())
    betas: tuple[float, float] = (0.9, 0.999)
    limit: int | None = None
    decay: Literal["constant", "cosine"] = "constant"
    bf16: bool = False
    heat: Any = 1.0
    label: str = ""


def test_values_of_every_type():
    (run,) = override(
        (Small(),),
        [
            "limit=5",
            "decay=cosine",
            "bf16=true",
            "heat=0.7",
            "label=1e3",
            "betas=0.8,0.95",
            "terms.1.mask.high=0.28",
            "model=some/path",
            "branching.width=16",
        ],
    )
    assert (run.limit, run.decay, run.bf16, run.heat, run.label) == (5, "cosine", True, 0.7, "1e3")
    assert run.betas == (0.8, 0.95)
    assert run.terms == (Term(), Term(Clip(0.2, 0.28)))
    assert run.model == "some/path"
    assert run.branching == Wide(16)


def test_none_index_and_later_value_wins():
    (run,) = override((Small(limit=3),), ["limit=None", "betas.1=0.5", "heat=2", "heat=3"])
    assert run.limit is None
    assert run.betas == (0.9, 0.5)
    assert run.heat == 3.0


def test_values_are_validated_together():
    assert override((Small(),), ["branching.branching=12", "branching.width=12"])[0].branching == Wide(12, 12)
    with pytest.raises(ValueError, match=r"branching\.width=1: width=1 is below branching=2"):
        override((Small(),), ["branching.width=1"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("limit=many", ["limit=many", "'many'", "a whole number or None"]),
        ("limit=2.5", ["'2.5'", "a whole number"]),
        ("bf16=1", ["'1'", "true or false"]),
        ("decay=linear", ["'linear'", "one of constant, cosine"]),
        ("terms.0.coefficient=big", ["terms.0.coefficient=big", "a number"]),
        ("terms.0.coefficient=nan", ["'nan'", "a number"]),
        ("betas=0.9", ["a list like a,b"]),
        ("branching=Star", ["branching is an object, Wide", "branching.width, branching.branching"]),
        ("branching.widht=4", ["no field 'widht'", "Did you mean branching.width?", "width, branching"]),
        ("stepz=4", ["no field 'stepz'", "It has: name, model"]),
        ("terms.2.coefficient=1", ["2 items, numbered from 0 to 1"]),
        ("limit.x=1", ["limit is None", "no field 'x'"]),
        ("steps", ["is no override", "field=value"]),
        ("=3", ["is no override"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(assignment: str, words: list[str]):
    with pytest.raises(ValueError, match=words[0].replace(".", r"\.").replace("(", r"\(")) as error:
        override((Small(),), [assignment])
    for word in words:
        assert word in str(error.value)


def test_stages_by_name_or_all_that_have_the_field():
    stages = (Small(name="sft", branching=Clip()), Small(name="rl"))
    first, second = override(stages, ["limit=7", "branching.width=4", "rl.bf16=true"])
    assert (first.limit, second.limit) == (7, 7)
    assert first.branching == Clip()
    assert second.branching == Wide(4)
    assert (first.bf16, second.bf16) == (False, True)
    with pytest.raises(ValueError, match="no field 'widht'"):
        override(stages, ["branching.widht=4"])
    with pytest.raises(ValueError, match="no field 'width'"):
        override(stages, ["sft.branching.width=4"])


def test_nothing_is_evaluated():
    (run,) = override((Small(),), ["label=__import__('os').getcwd()"])
    assert run.label == "__import__('os').getcwd()"
    with pytest.raises(ValueError, match="is not a number"):
        override((Small(),), ["heat=__import__('os')"])
