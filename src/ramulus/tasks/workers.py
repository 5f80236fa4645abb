"""Worker processes that can be killed: anything that judges untrusted output runs here, under a limit on time and memory.

A worker is a fresh Python process (no fork, so threads and torch in the parent do no harm; the parent's main module is not run
again). It works on one call at a time. What the parent sends is pickled; what comes back is JSON of a limited size, read by a
deadline and checked, since a worker reads hostile text and may no longer be itself. A call that exceeds its limit costs its
worker its life, and a new one takes its place. Workers ignore Ctrl-C, end when the parent closes their pipe, and are killed by
the kernel when the parent dies (Linux) or at the latest when the limit of the call under way runs out (elsewhere).
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.machinery
import importlib.util
import io
import json
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, get_args

from ramulus.tasks.frames import LARGEST_ANSWER, receive, send
from ramulus.tasks.grading_budget import GradingBudget, current_budget
from ramulus.tasks.sandbox import environment, kill_marked

ATTEMPTS = 3
START_LIMIT = (
    120.0  # wall seconds for a worker to start and to import what a call needs; not counted in the call's own limit
)
BOOT = (
    "import sys; sys.path[:0] = {path!r}; from ramulus.tasks.worker_main import answer_calls; "
    "answer_calls({fd}, {parent}, {gigabytes!r}, {network!r})"
)


Cause = Literal["timeout", "died", "memory", "raised", "broken", "refused"]
"""Why a call has no value; broken: it never began; refused: the step's seconds of grading were spent."""


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its value, or why there is none."""

    value: Any = None
    failure: str | None = None
    cause: Cause | None = None

    @property
    def cut(self) -> bool:
        """Whether the limits ended the call, or it took its worker down: what a hostile input does."""
        return self.cause in ("timeout", "died", "memory", "refused")


FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGQUIT")
_Item = tuple[Future["Outcome"], bytes, float, float, GradingBudget | None]


class WorkerDied(Exception):
    """The worker ended before the call began."""


class Worker:
    """One process and the pipe to it; used by one thread. `network`: it may reach others; `env`: names of the environment that it sees, too."""

    def __init__(self, gigabytes: float | None, network: bool = False, env: tuple[str, ...] = ()) -> None:
        self.gigabytes, self.network, self.env = gigabytes, network, env
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: socket.socket | None = None
        self.folder = self.mark = ""
        self.took = 0.0  # seconds of the last call
        self.closing = False  # whether it is its pool that kills it

    def start(self) -> None:
        """Start the process in an empty folder; it answers `ready` when it can take a call."""
        here, there = socket.socketpair()
        boot = BOOT.format(
            path=[os.path.abspath(p) for p in sys.path if p],
            fd=there.fileno(),
            parent=os.getpid(),
            gigabytes=self.gigabytes,
            network=self.network,
        )
        self.folder, self.mark = tempfile.mkdtemp(prefix="ramulus-worker-"), uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.DEVNULL,
            pass_fds=(there.fileno(),),
            process_group=0,  # Ctrl-C in the terminal goes to the parent's group alone
            cwd=self.folder,
            env=environment(self.folder, self.mark, self.env),
        )
        there.close()
        self.pipe = here

    def call(self, payload: bytes, seconds: float, wall: float) -> Outcome:
        """Run one call; never takes longer than the start limit plus `wall` seconds. Raises WorkerDied if it never began."""
        if self.process is None or self.process.poll() is not None:
            self.kill()
            self.start()
        assert self.pipe is not None
        ready_by = time.monotonic() + START_LIMIT
        try:
            send(self.pipe, pickle.dumps((seconds, wall)), ready_by)
            send(self.pipe, payload, ready_by)
            if receive(self.pipe, LARGEST_ANSWER, ready_by) != b"ready":
                raise ValueError("not a worker's first word")
        except TimeoutError:
            self.kill()
            return Outcome(None, f"the worker did not get ready within {START_LIMIT:g} seconds", "broken")
        except (EOFError, OSError, ValueError):
            raise WorkerDied(self.kill()) from None
        began = time.monotonic()
        outcome = self._result(seconds, wall)
        self.took = seconds if outcome.cause == "timeout" else min(time.monotonic() - began, seconds)
        return outcome

    def _result(self, seconds: float, wall: float) -> Outcome:
        assert self.pipe is not None
        try:
            return read_answer(receive(self.pipe, LARGEST_ANSWER, time.monotonic() + wall))
        except TimeoutError:
            self.kill()
            return Outcome(None, f"no result within {wall:g} seconds", "timeout")
        except (EOFError, OSError):
            how = self.kill()
            if how == "SIGPROF":
                return Outcome(None, f"no result within {seconds:g} seconds of computing", "timeout")
            return Outcome(None, f"the worker died: {how}", "died")
        except ValueError as error:
            self.kill()
            return Outcome(None, f"the worker was ended, what it sent is no answer: {error}", "died")

    def kill(self) -> str:
        """End the process and whatever it started, if there is one, and say how it ended: a signal's name or an exit code."""
        process, pipe = self.process, self.pipe
        self.process = self.pipe = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return "not running"
        try:  # a closed pipe means it is ending by itself; how it does is worth knowing
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        kill_marked(self.mark)
        shutil.rmtree(self.folder, ignore_errors=True)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def read_answer(message: bytes) -> Outcome:
    """What a worker sent, if it is the JSON of an outcome; raises ValueError."""
    try:
        content = json.loads(message.decode("ascii"))
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    match content:
        case {"value": value, **rest} if not rest:
            return Outcome(value)
        case {"failure": str(failure), "cause": str(cause), **rest} if not rest and cause in get_args(Cause):
            return Outcome(None, failure, cause)  # type: ignore[arg-type]
    raise ValueError(f"JSON of another shape: {message[:80]!r}")


class WorkerPool:
    """`count` workers behind one queue; calls run in the order they come, `count` at a time. Safe in threads and in any event loop."""

    def __init__(
        self, count: int = 2, gigabytes: float | None = None, network: bool = False, env: tuple[str, ...] = ()
    ) -> None:
        if count < 1:
            raise ValueError(f"a pool needs at least one worker, got {count}")
        self.calls: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self.workers = [Worker(gigabytes, network, env) for _ in range(count)]
        self.closed = False
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self.workers]
        for thread in self.threads:  # each thread starts its process at the first call
            thread.start()
        atexit.register(self.close)

    def submit(
        self, call: Callable[..., Any], *args: Any, seconds: float, wall: float | None = None, once: bool = False
    ) -> Future[Outcome]:
        """Run `call(*args)` in a worker, at most `seconds` of computing and `wall` seconds (default: 5 x seconds) of waiting.

        The future holds an Outcome and never an exception. `once`: equal calls of a step share one outcome. `call` may have a
        method `prepare()`: what it loads is not timed.
        Raises ValueError if `call` cannot be pickled.
        """
        if self.closed:
            raise RuntimeError("this pool was closed")
        budget, payload = current_budget(), pack_call(call, args)
        if budget is not None and once and payload in budget.shared:
            return budget.shared[payload]
        future: Future[Outcome] = Future()
        if budget is not None and once:
            budget.shared[payload] = future
        self.calls.put((future, payload, seconds, 5 * seconds if wall is None else wall, budget))
        return future

    async def run(
        self, call: Callable[..., Any], *args: Any, seconds: float, wall: float | None = None, once: bool = False
    ) -> Outcome:
        """Await the outcome of `submit`; where others share the call, cancelling one of them does not end it."""
        future = self.submit(call, *args, seconds=seconds, wall=wall, once=once)
        return await (asyncio.shield(asyncio.wrap_future(future)) if once else asyncio.wrap_future(future))

    def _serve(self, worker: Worker) -> None:
        while (item := self.calls.get()) is not None:
            future, payload, seconds, wall, budget = item
            if not future.set_running_or_notify_cancel():
                continue
            if self.closed:
                future.set_result(Outcome(None, "the pool was closed", "broken"))
                continue
            try:
                future.set_result(_within(budget, worker, payload, seconds, wall))
            except Exception as error:  # a thread that ended here would leave callers waiting for ever
                worker.kill()
                future.set_result(Outcome(None, f"{type(error).__name__}: {error}", "broken"))
        worker.kill()

    def close(self) -> None:
        """Kill the workers; calls under way end as failures."""
        if self.closed:
            return
        self.closed = True
        for _ in self.threads:
            self.calls.put(None)
        for worker in self.workers:
            worker.closing = True
            process = worker.process
            if process is not None and process.poll() is None:
                process.kill()
        atexit.unregister(self.close)


def _within(budget: GradingBudget | None, worker: Worker, payload: bytes, seconds: float, wall: float) -> Outcome:
    """The outcome of a call, if something is left of the step's budget."""
    if budget is None:
        return _persistent(worker, payload, seconds, wall)
    if budget.refuses():
        budget.note("refused", 0.0)
        return Outcome(None, f"the {budget.seconds:g} seconds of grading of this step are spent", "refused")
    outcome = _persistent(worker, payload, seconds, wall)
    budget.note(outcome.cause, worker.took)
    return outcome


def _persistent(worker: Worker, payload: bytes, seconds: float, wall: float) -> Outcome:
    """A worker that died between calls is replaced, and one that was killed from outside in mid-call as well, once: neither is the call's doing."""
    how, killed = "", False
    for attempt in range(ATTEMPTS):
        try:
            outcome = worker.call(payload, seconds, wall)
        except WorkerDied as death:
            how = str(death)
            time.sleep(0.2 * attempt)  # where memory is short another moment may have some
            continue
        if outcome.cause != "died" or not str(outcome.failure).endswith(FROM_OUTSIDE) or killed or worker.closing:
            return outcome
        killed = True
    return Outcome(
        None,
        f"{ATTEMPTS} grading processes ended before they were ready, the last with {how}; {_remedy(how)}",
        "broken",
    )


def _remedy(how: str) -> str:
    """What to do where workers do not start."""
    if how in FROM_OUTSIDE:
        return "the system kills them, as it does where memory runs out: free some, or give the reward fewer workers"
    return "what they printed on stderr says why; `ramulus doctor` tries one"


@lru_cache(maxsize=8)
def _pool(count: int, gigabytes: float | None, network: bool, env: tuple[str, ...], pid: int) -> WorkerPool:
    return WorkerPool(count, gigabytes, network, env)


def worker_pool(
    count: int = 2, gigabytes: float | None = None, network: bool = False, env: tuple[str, ...] = ()
) -> WorkerPool:
    """The process-wide pool of this size and these rights; one that was closed, or that belongs to the process we were forked from, is replaced."""
    pool = _pool(count, gigabytes, network, env, os.getpid())
    if pool.closed:
        _pool.cache_clear()
        pool = _pool(count, gigabytes, network, env, os.getpid())
    return pool


def pack_call(call: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle a call together with the files of the modules it needs, since a recipe's module may not be importable by its name."""
    files: dict[str, str] = {}

    class Noting(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            module = (
                sys.modules.get(getattr(obj, "__module__", None) or "")
                if isinstance(obj, type) or callable(obj)
                else None
            )
            if module is not None and module.__name__ == "__main__" and not getattr(module, "__file__", None):
                raise pickle.PicklingError("it was defined in a notebook or at a prompt")
            if module is not None and _needs_file(module):
                files[module.__name__] = os.path.abspath(str(module.__file__))
            return NotImplemented

    buffer = io.BytesIO()
    try:
        Noting(buffer).dump((call, args))
    except Exception as error:
        try:
            return pickle.dumps(({}, by_value(call, args)))
        except Exception as other:
            why = error if isinstance(other, ImportError) else other
            raise ValueError(
                f"{call!r} cannot be sent to a worker process ({type(why).__name__}: {why}): "
                "use a function or frozen dataclass defined at the top level of a module, or install cloudpickle, which sends any function"
            ) from None
    return pickle.dumps((files, buffer.getvalue()))


def by_value(call: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """A call with the code of its functions: lambdas, closures, what a notebook cell or a recipe file defines. ImportError without cloudpickle."""
    import cloudpickle

    module = sys.modules.get(getattr(call, "__module__", None) or "")
    local = module is not None and module.__name__ != "__main__" and _needs_file(module)
    if local:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((call, args)))
    finally:
        if local:
            cloudpickle.unregister_pickle_by_value(module)


def _needs_file(module: ModuleType) -> bool:
    if not getattr(module, "__file__", None):
        return False
    if module.__name__ == "__main__":
        return True
    if importlib.machinery.PathFinder.find_spec(module.__name__.partition(".")[0]) is None:
        return True  # find_spec answers for every module that is loaded, from wherever
    try:
        return importlib.util.find_spec(module.__name__) is None
    except (ImportError, ValueError):  # ValueError: a module made by hand has no __spec__
        return True
