"""What runs inside a worker process: take a call, arm the limits, answer in JSON. Imports the standard library, frames and sandbox."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import signal
import socket
import sys
from numbers import Real
from typing import Any

from ramulus.tasks.frames import LARGEST_ANSWER, receive, send
from ramulus.tasks.sandbox import confine


class _Finder(pickle.Unpickler):
    """Finds classes by module name, or in the module's file where the name cannot be imported."""

    def __init__(self, data: bytes, files: dict[str, str]) -> None:
        super().__init__(io.BytesIO(data))
        self.files = files

    def find_class(self, module: str, name: str) -> Any:
        if module in self.files:
            _load(module, self.files[module])
        return super().find_class(module, name)


def _load(name: str, file: str) -> None:
    """Import `file` as the module `name`; a script is imported as `__mp_main__`, so that its main block does not run."""
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__ramulus_file__", None) == file:
        return
    spec = importlib.util.spec_from_file_location("__mp_main__" if name == "__main__" else name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__ramulus_file__ = file  # type: ignore[attr-defined]
    sys.modules[name] = sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def answer_calls(fd: int, parent: int, gigabytes: float | None, network: bool) -> None:
    """Answer calls on the pipe until it closes; `parent` is the id of the process that started this one."""
    confine(parent, gigabytes, network)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.dup2(2, 1)  # what a reward prints goes to stderr
    pipe = socket.socket(fileno=fd)
    while True:
        try:
            seconds, wall = pickle.loads(receive(pipe))
            files, data = pickle.loads(receive(pipe))
        except (EOFError, OSError):
            return
        send(pipe, _answer(pipe, files, data, seconds, wall))


def _answer(pipe: socket.socket, files: dict[str, str], data: bytes, seconds: float, wall: float) -> bytes:
    """Prepare the call, say so, run it under its limits, and say in JSON what became of it."""
    try:
        call, args = _Finder(data, files).load()
        prepare = getattr(call, "prepare", None)
        if prepare is not None:
            prepare()
    except BaseException as error:
        send(pipe, b"ready")
        return _failure(error, "broken")
    send(pipe, b"ready")
    # the kernel ends the process even while a long C call (a huge power) keeps the interpreter from running anything
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall + 1)  # in case the parent is gone
    try:
        return _value(_run(call, args))
    except BaseException as error:  # SystemExit of a scorer is a failure like any other
        return _failure(error, "memory" if isinstance(error, MemoryError | RecursionError) else "raised")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run(call: Any, args: tuple[Any, ...]) -> Any:
    value = call(*args)
    if not hasattr(value, "__await__"):
        return value
    import asyncio

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _value(value: Any) -> bytes:
    """The answer of a call; raises TypeError or ValueError where it is no JSON, or too large."""
    message = json.dumps({"value": value}, default=_number).encode("ascii")
    if len(message) > LARGEST_ANSWER:
        raise ValueError(f"the answer has {len(message)} bytes as JSON, more than {LARGEST_ANSWER}: return less")
    return message


def _number(value: Any) -> float:
    """numpy's numbers and fractions as plain ones."""
    if isinstance(value, Real):
        return float(value)
    if getattr(value, "shape", None) == () and callable(
        getattr(value, "item", None)
    ):  # np.bool_, a tensor of no dimensions
        return float(value.item())
    raise TypeError(f"a {type(value).__name__} is no answer: return numbers, strings, lists and dicts of them")


def _failure(error: BaseException, cause: str) -> bytes:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # an exception may fail to print itself
        text = type(error).__name__
    return json.dumps({"failure": text[:500], "cause": cause}).encode("ascii")
