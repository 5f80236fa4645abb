"""Whether two functions compute the same: how a fast path knows a model, whatever its classes are called."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any

from torch import nn


def alike(one: Any, other: Any) -> bool:
    """Whether two functions have the same byte code, constants and decorators, and so have the functions of their modules that they name."""
    pending, seen = [(one, other)], set()
    while pending:
        one, other = pending.pop()
        if one is other or (id(one), id(other)) in seen:
            continue
        seen.add((id(one), id(other)))
        if not (isinstance(one, FunctionType) and isinstance(other, FunctionType) and same_code(one.__code__, other.__code__)):
            return False
        if hasattr(one, "__wrapped__") or hasattr(other, "__wrapped__"):
            pending.append((getattr(one, "__wrapped__", None), getattr(other, "__wrapped__", None)))
        for name in looked_up(one.__code__):
            mine, theirs = one.__globals__.get(name), other.__globals__.get(name)
            if isinstance(mine, FunctionType) or isinstance(theirs, FunctionType):
                pending.append((mine, theirs))
            elif mine is not theirs and (type(mine) is not type(theirs) or isinstance(mine, type | int | float | str | tuple)):
                return False
    return True


def same_code(one: CodeType, other: CodeType) -> bool:
    """Whether two pieces of byte code are the same but for line numbers and docstrings."""
    if (one.co_code, one.co_names, one.co_varnames, one.co_freevars) != (other.co_code, other.co_names, other.co_varnames, other.co_freevars):
        return False
    first, second = (code.co_consts[isinstance(code.co_consts[0], str) :] if code.co_consts else () for code in (one, other))
    if len(first) != len(second):
        return False
    return all(same_code(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else a == b for a, b in zip(first, second))


def looked_up(code: CodeType) -> set[str]:
    """The names that a piece of code looks up, in what it holds too."""
    return set(code.co_names).union(*(looked_up(const) for const in code.co_consts if isinstance(const, CodeType)))


def hooked(module: nn.Module) -> bool:
    """Whether something is hooked to a module, or put in the place of its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def runs_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module's forward is that of one of these classes."""
    return any(alike(type(module).forward, kind.forward) for kind in kinds)
