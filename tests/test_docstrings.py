"""Every public type shows how it is used, and the example does what it says."""

from __future__ import annotations

import doctest
import inspect
import sys
from collections.abc import Callable

import pytest

import ramulus

TYPES = [name for name in ramulus.__all__ if inspect.isclass(getattr(ramulus, name))]


def example(thing: type) -> doctest.DocTest:
    """The example in a type's own docstring."""
    names = dict(vars(sys.modules[thing.__module__]))
    return doctest.DocTestParser().get_doctest(thing.__doc__ or "", names, thing.__name__, None, 0)


@pytest.mark.parametrize("name", TYPES)
def test_a_public_type_has_an_example_that_runs(name: str):
    shown = example(getattr(ramulus, name))
    assert shown.examples, f"{name} has no Example in its docstring"
    assert doctest.DocTestRunner(verbose=False).run(shown, out=collect(said := [])).failed == 0, "".join(said)


@pytest.mark.parametrize("name", [name for name in ramulus.__all__ if name not in TYPES])
def test_the_examples_of_public_functions_run(name: str):
    shown = example(getattr(ramulus, name))
    assert doctest.DocTestRunner(verbose=False).run(shown, out=collect(said := [])).failed == 0, "".join(said)


def collect(said: list[str]) -> Callable[[str], None]:
    """What a failing example prints, kept for the message."""
    return lambda text: said.append(text)


def test_an_example_that_is_wrong_is_seen():
    class Wrong:
        """Adds.

        Example:
            >>> 1 + 1
            3
        """

    assert doctest.DocTestRunner(verbose=False).run(example(Wrong), out=collect([])).failed == 1
