"""Every mix of a shipped recipe has the form of a row of METHODS, which test_equivalence holds against its textbook loss."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import pytest

import ramulus.recipes
from methods import METHODS
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Smooth, Switch
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, QuestionMean, SequenceMean, Term
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.recipes import dapo, grpo, hpt
from ramulus.recipes import ramulus as everything
from ramulus.run.config.recipe import Run

NUMBERS = {  # settings that change no form as long as they stay on (or off: 0 or None)
    Mix: {"kl_coef", "entropy_bonus", "value"},
    Term: {"coefficient"},
    ConstantLength: {"length"},
    Clip: {"low", "high"},
    DualClip: {"low", "high", "ceiling"},
    AdaptiveClip: {"low", "high", "ceiling"},
    Redistribution: {"low", "high"},
    GroupMean: {"eps"},
    TokenGroupMean: {"eps", "fallback", "width"},
    GlobalLocal: {"trained"},
}
THRESHOLDS = {Switch: {"threshold"}, Smooth: {"threshold"}}  # 0 is a number like others
PLAIN = (str, bool, int, float, Enum, type(None))


def form(value: Any) -> Any:
    """Class by class what an object is made of, without its plain numbers."""
    if isinstance(value, PLAIN):
        return type(value).__name__ if isinstance(value, Enum) else "", value
    if isinstance(value, tuple):
        return tuple(form(part) for part in value)
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"the form of {value!r} is unknown: it is neither a dataclass nor plain")
    kind = type(value)
    return kind, tuple((f.name, setting(kind, f.name, getattr(value, f.name))) for f in fields(value))


def setting(kind: type, name: str, value: Any) -> Any:
    """The form of one field."""
    if name in THRESHOLDS.get(kind, ()):
        return "a number"
    if name in NUMBERS.get(kind, ()):
        assert value is None or isinstance(value, int | float)
        return "a number" if value else "off"
    return form(value)


def rows_for(mix: Mix) -> list[str]:
    """The names of the rows of METHODS whose mix has the same form."""
    return [name for name, method in METHODS.items() if form(method.mix) == form(mix)]


def shipped() -> Iterator[tuple[str, Mix]]:
    """Every stage of every variant of every recipe module, and its mix."""
    for found in pkgutil.iter_modules(ramulus.recipes.__path__):
        module = importlib.import_module(f"ramulus.recipes.{found.name}")
        variants = {
            name: make
            for name, make in inspect.getmembers(module, inspect.isfunction)
            if make.__module__ == module.__name__
            and not name.startswith("_")
            and not inspect.signature(make).parameters
        }
        assert "recipe" in variants, f"{found.name} has no recipe()"
        for name, make in variants.items():
            made = make()
            for i, run in enumerate(made if isinstance(made, tuple) else (made,)):
                assert isinstance(run, Run), f"{found.name}.{name}() makes no Run"
                yield f"{found.name}.{name}.{i}", run.mix


SHIPPED = dict(shipped())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_mix_is_held_against_a_textbook(name: str) -> None:
    assert rows_for(SHIPPED[name]), f"the mix of {name} has no row in METHODS: add one, with its textbook loss"


def test_no_recipe_and_no_stage_is_left_out() -> None:
    modules = {found.name for found in pkgutil.iter_modules(ramulus.recipes.__path__)}
    assert {name.split(".")[0] for name in SHIPPED} == modules
    assert {"attnrl.recipe.0", "hapo.released.0", "quickstart.recipe.1", "ramulus.small.0"} <= set(SHIPPED)
    assert "sft" in rows_for(SHIPPED["sft_then_grpo.recipe.0"])
    assert "grpo" in rows_for(SHIPPED["sft_then_grpo.recipe.1"])


def with_estimator(mix: Mix, **changes: Any) -> Mix:
    """A mix whose first term's estimator has other parts."""
    first = replace(mix.terms[0], estimator=replace(mix.terms[0].estimator, **changes))
    return replace(mix, terms=(first, *mix.terms[1:]))


WHOLE, STAR, FLAT, GATED = (module.recipe().mix for module in (everything, grpo, dapo, hpt))
MASK = WHOLE.terms[0].estimator.mask
UNSIGNED = tuple(replace(part, signal=replace(part.signal, signed=False)) for part in MASK.parts)
UNKNOWN = {
    "a reference": with_estimator(STAR, reference=Itself()),
    "a column": with_estimator(FLAT, mask=DualClip(0.2, 0.28, 10.0, "recomputed"), reference=Recomputed()),
    "a switch of an advantage": with_estimator(STAR, advantage=GroupMean(leave_one_out=True)),
    "a normaliser": replace(STAR, terms=(replace(STAR.terms[0], normaliser=ConstantLength(3)),)),
    "a KL term": replace(STAR, kl_coef=0.04),
    "a gate": replace(GATED, gate=Smooth()),
    "a gate's third way": replace(GATED, gate=Switch(0.0, off=0.5)),
    "a missing term": replace(WHOLE, terms=WHOLE.terms[:1]),
    "terms in another order": replace(WHOLE, terms=WHOLE.terms[::-1]),
    "shares": replace(WHOLE, share="each_leaf"),
    "a signal deep inside": with_estimator(WHOLE, mask=replace(MASK, parts=UNSIGNED)),
    "a mask less": with_estimator(WHOLE, mask=replace(MASK, parts=MASK.parts[:1])),
    "paths nothing branches from": with_estimator(WHOLE, advantage=GlobalLocal()),
    "new": Mix((Term(Estimator(Everything(), Behavior(), GlobalLocal()), normaliser=QuestionMean()),)),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_mix_is_not_found(what: str) -> None:
    assert rows_for(UNKNOWN[what]) == []


def test_plain_numbers_change_no_form() -> None:
    wide = Term(Estimator(Clip(0.1, 0.4), Behavior(), GroupMean(eps=1e-4)), normaliser=SequenceMean(), coefficient=0.5)
    assert rows_for(Mix((wide,))) == ["grpo"]
    assert form(replace(STAR, kl_coef=0.04)) == form(replace(STAR, kl_coef=0.001)) != form(STAR)


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(TypeError, match="is unknown"):
        form(with_estimator(STAR, advantage=lambda forest: []))
