"""Worker processes: what they survive, that nothing hangs, that no process is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path as File

import pytest

import guarded_rewards as rewards
from ramulus.core.task import GraderLost, Path, Task
from ramulus.run.config.python_file import read_file
from ramulus.tasks import sandbox, workers
from ramulus.tasks.grading_budget import grading_budget
from ramulus.tasks.guard import Guarded
from ramulus.tasks.workers import Outcome, WorkerPool, worker_pool

TASK = Task("t", (), "?", "yes")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def path(text: str) -> Path:
    return Path(text, (1,), "eos")


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    made = WorkerPool(2, gigabytes=2.0)
    yield made
    made.close()


def ask(
    workers: WorkerPool, reward: Callable[..., object], text: str, seconds: float = 0.4, wall: float | None = None
) -> Outcome:
    return workers.submit(reward, TASK, path(text), seconds=seconds, wall=wall).result(timeout=60)


def test_a_value_and_lean_start_up(two: WorkerPool) -> None:
    assert ask(two, rewards.length, "abc") == Outcome(3.0)
    heavy = {"torch", "numpy", "transformers", "sympy", "math_verify", "reasoning_gym", "datasets"}
    fresh = WorkerPool(1)
    names = fresh.submit(rewards.loaded, seconds=5).result(timeout=60).value
    fresh.close()
    assert "ramulus.core.task" in names
    assert not heavy & set(names)


@pytest.mark.parametrize(
    ("reward", "text", "cause", "failure"),
    [
        (rewards.spin, "spin", "timeout", "no result within 0.4 seconds of computing"),
        (rewards.power, "9", "timeout", "no result within 0.4 seconds of computing"),
        (rewards.sleep, "50", "timeout", "no result within 0.8 seconds"),
        (rewards.stubborn, "", "timeout", "no result within 0.8 seconds"),
        (rewards.leave, "", "died", "the worker died: exit code 3"),
        (rewards.crash, "", "died", "the worker died: SIGSEGV"),
        (rewards.hoard, "", "memory", "MemoryError: "),
        (rewards.wrong_type, "a", "raised", "TypeError: unsupported operand type(s) for +: 'float' and 'str'"),
        (rewards.quit, "", "raised", "SystemExit: 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_call_that_goes_wrong_is_bounded_and_the_next_one_works(
    two: WorkerPool, reward: Callable[..., object], text: str, cause: str, failure: str
) -> None:
    ask(two, rewards.length, "warm")
    began = time.monotonic()
    outcome = ask(two, reward, text, wall=0.8 if "0.8" in failure else 30)
    assert (outcome.cause, outcome.failure) == (cause, failure)
    assert outcome.cut == (cause != "raised")
    assert time.monotonic() - began < 30
    assert [ask(two, rewards.length, "ab") for _ in range(3)] == [Outcome(2.0)] * 3


def test_answers_are_plain_json_of_a_limited_size(two: WorkerPool) -> None:
    outcome = ask(two, rewards.no_json, "")
    assert (outcome.cause, outcome.failure) == (
        "raised", "TypeError: a function is no answer: return numbers, strings, lists and dicts of them"
    )  # fmt: skip
    outcome = two.submit(rewards.long_text, 2**21, seconds=5).result(timeout=60)
    assert outcome.cause == "raised"
    assert str(outcome.failure).startswith("ValueError: the answer has 2097")
    assert len(two.submit(rewards.long_text, 10**6, seconds=5).result(timeout=60).value) == 10**6
    known = {"reward": 0.5, "parts": [1, 2.5, True, None], "text": "\ud800 \u00e9"}
    assert two.submit(rewards.numbers, seconds=5).result(timeout=60) == Outcome(known)


@pytest.mark.parametrize(
    ("kind", "cause", "failure"),
    [
        ("pickle", "died", "codec can't decode"),
        ("no JSON", "died", "Expecting property name"),
        ("no ASCII", "died", "codec can't decode"),
        ("deep", "died", "JSON nested too deep"),
        ("long number", "died", "Exceeds the limit"),
        ("shape", "died", "JSON of another shape"),
        ("more", "died", "Expecting ',' delimiter"),
        ("cause", "died", "JSON of another shape"),
        ("huge", "died", "4294967295 bytes are announced, at most 1048576 are taken"),
        ("bytes", "died", "bytes are announced"),
        ("half", "timeout", "no result within 1 seconds"),
    ],
)
def test_what_a_hostile_worker_sends_is_refused_and_never_run(
    two: WorkerPool, tmp_path: File, kind: str, cause: str, failure: str
) -> None:
    ask(two, rewards.length, "warm")
    trap = tmp_path / "trap"
    outcome = two.submit(rewards.forge, kind, str(trap), seconds=5, wall=1).result(timeout=60)
    assert outcome.value is None
    assert outcome.cause == cause
    assert failure in str(outcome.failure)
    assert not trap.exists()
    assert [ask(two, rewards.length, "ab") for _ in range(3)] == [Outcome(2.0)] * 3


def test_an_answer_that_drips_in_ends_at_the_limit(two: WorkerPool) -> None:
    ask(two, rewards.length, "warm")
    began = time.monotonic()
    assert two.submit(rewards.drip, 600, seconds=5, wall=0.8).result(timeout=60).cause == "timeout"
    assert time.monotonic() - began < 10


def test_an_answer_nobody_asked_for_is_not_taken_for_the_next_call() -> None:
    made = WorkerPool(1)
    first = int(ask(made, rewards.process, "").value)
    assert made.submit(rewards.forge_ready, 1, seconds=5).result(timeout=60) == Outcome(1)
    assert int(ask(made, rewards.process, "").value) != first, "the worker is replaced"
    made.close()


def test_many_at_once_from_several_event_loops(two: WorkerPool) -> None:
    async def main() -> list[Outcome]:
        hanging = two.run(rewards.spin, TASK, path("spin"), seconds=0.4)
        return await asyncio.gather(hanging, *(two.run(rewards.square, n, seconds=5) for n in range(200)))

    for _ in range(2):
        first, *rest = asyncio.run(main())
        assert first.cause == "timeout"
        assert [outcome.value for outcome in rest] == [n * n for n in range(200)]


def test_two_workers_work_side_by_side(two: WorkerPool) -> None:
    ask(two, rewards.length, "warm")

    async def main() -> float:
        began = time.monotonic()
        await asyncio.gather(*(two.run(rewards.sleep, TASK, path("0.8"), seconds=5) for _ in range(2)))
        return time.monotonic() - began

    asyncio.run(main())  # both have started now
    assert asyncio.run(main()) < 1.55


def test_a_cancelled_call_leaves_the_crew_in_order(two: WorkerPool) -> None:
    async def main() -> Outcome:
        calls = [asyncio.ensure_future(two.run(rewards.sleep, TASK, path("0.3"), seconds=5)) for _ in range(6)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return await two.run(rewards.square, 3, seconds=5)

    assert asyncio.run(main()) == Outcome(9)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_killed_between_calls_are_replaced(number: signal.Signals) -> None:
    made = WorkerPool(1)
    first = int(ask(made, rewards.process, "").value)
    os.kill(first, number)
    second = int(ask(made, rewards.process, "").value)
    assert first != second
    made.close()
    assert gone(second)


def test_ctrl_c_does_not_reach_the_workers(two: WorkerPool) -> None:
    worker = int(ask(two, rewards.process, "").value)
    assert os.getpgid(worker) != os.getpgid(0)
    busy = (
        two.submit(rewards.sleep, TASK, path("0.6"), seconds=5),
        two.submit(rewards.sleep, TASK, path("0.6"), seconds=5),
    )
    time.sleep(0.2)
    os.kill(worker, signal.SIGINT)
    assert [call.result(timeout=60) for call in busy] == [Outcome(1.0)] * 2


def test_what_a_killed_call_started_dies_with_it(two: WorkerPool, tmp_path: File) -> None:
    note = tmp_path / "child"
    assert ask(two, rewards.spawn_and_spin, str(note), seconds=0.5).cause == "timeout"
    assert gone(int(note.read_text()))


def test_close_ends_what_is_under_way() -> None:
    made = WorkerPool(1)
    worker = int(ask(made, rewards.process, "").value)
    calls = [made.submit(rewards.spin, TASK, path("spin"), seconds=30) for _ in range(3)]
    time.sleep(0.2)
    made.close()
    assert all(call.result(timeout=10).failure for call in calls)
    assert gone(worker)
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(rewards.square, 2, seconds=1)


def test_the_shared_crew_is_shared_and_replaced_when_closed() -> None:
    first = worker_pool(1, 3.0)
    assert first is worker_pool(1, 3.0)
    first.close()
    assert worker_pool(1, 3.0) is not first
    assert worker_pool(1, 3.0).submit(rewards.square, 5, seconds=5).result(timeout=60) == Outcome(25)
    worker_pool(1, 3.0).close()
    with pytest.raises(ValueError, match="at least one worker, got 0"):
        WorkerPool(0)


def gone(process: int, within: float = 5.0) -> bool:
    """Whether the process has ended (a zombie has)."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
            with open(f"/proc/{process}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


PARENT = """
import sys, time, os, signal
sys.path.insert(0, {tests!r})
import guarded_rewards as rewards
from ramulus.core.task import Path, Task
from ramulus.tasks.workers import WorkerPool
pool = WorkerPool(2)
first = pool.submit(rewards.process, Task("t", (), "?"), Path("", (), "eos"), seconds=60).result()
pool.submit(rewards.power, Task("t", (), "?"), Path("9", (), "eos"), seconds=60)
pool.submit(rewards.power, Task("t", (), "?"), Path("9", (), "eos"), seconds=60)
pool.submit(rewards.power, Task("t", (), "?"), Path("9", (), "eos"), seconds=60)
time.sleep(1.0)
print(*(worker.process.pid for worker in pool.workers), flush=True)
{end}
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: elsewhere a worker outlives a killed parent by its time limit"
)
@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)", "raise KeyboardInterrupt", "os._exit(1)"]
)
def test_busy_workers_die_with_their_parent(end: str) -> None:
    code = PARENT.format(tests=str(File(__file__).parent), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    assert all(gone(worker) for worker in workers)


def test_rewards_of_a_script_and_of_a_file_that_is_no_module(tmp_path: File) -> None:
    """A recipe is often a plain file: its rewards are found by the file, and its main part does not run again."""
    (tmp_path / "mine.py").write_text("def twice(task, path):\n    return 2 * len(path.text)\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, importlib.util, sys
        from dataclasses import dataclass
        from ramulus.core.task import Path, Task
        from ramulus.tasks.guard import Guarded

        @dataclass(frozen=True)
        class Mine:
            scale: int = 3
            def __call__(self, task, path):
                return self.scale * len(path.text)

        spec = importlib.util.spec_from_file_location("a_recipe", {str(tmp_path / "mine.py")!r})
        module = importlib.util.module_from_spec(spec)
        sys.modules["a_recipe"] = module
        spec.loader.exec_module(module)

        if __name__ == "__main__":
            task, path = Task("t", (), "?"), Path("ab", (), "eos")
            for reward in (Mine(), module.twice):
                print(asyncio.run(Guarded(reward, workers=1)(task, path)))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.split() == ["6", "4"], done.stderr


def test_guarded_rewards() -> None:
    def judged(reward: Callable[..., object], text: str, **options: float) -> object:
        return asyncio.run(Guarded(reward, **{"seconds": 0.4, "wall": 30, **options})(TASK, path(text)))  # type: ignore[arg-type]

    assert judged(rewards.length, "abc") == 3.0
    assert judged(rewards.slow_length, "abc") == 3.0
    assert judged(rewards.Parts(2.0), "yes") == {"reward": 2.0, "correct": 1.0}
    assert judged(rewards.spin, "spin", wrong=-1.0) == {
        "reward": -1.0,
        "reason": "timeout: no result within 0.4 seconds of computing",
    }
    with pytest.raises(RuntimeError, match=r"failed on task 't': TypeError"):
        judged(rewards.wrong_type, "a")
    bonus, lock = 2.0, threading.Lock()
    assert judged(lambda task, path: len(path.text) + bonus, "abc", seconds=5.0) == 5.0, "a lambda goes with what it closes over"
    with pytest.raises(ValueError, match=r"cannot be sent to a worker process.*top level of a module"):
        judged(lambda task, path: lock.locked(), "a")


def test_a_function_of_a_notebook_or_a_recipe_file_is_guarded(tmp_path: File) -> None:
    """A cell's module is __main__ without a file; a recipe's is in no folder that is searched."""
    cell = "import asyncio\nfrom ramulus import Path, Task\nfrom ramulus.tasks.guard import Guarded\nK = 4.0\ndef add(n): return n + K\n"
    cell += "def score(task, path): return add(len(path.text))\n"
    cell += "print(asyncio.run(Guarded(score)(Task('t', (1,), 't'), Path('ab', (1, 2), 'eos'))))"
    done = subprocess.run([sys.executable, "-c", cell], capture_output=True, text=True, timeout=120)
    assert done.stdout == "6.0\n", done.stderr
    recipe = tmp_path / "own.py"
    recipe.write_text("K = 3.0\ndef add(n): return n + K\nscores = [lambda task, path: add(len(path.text))]\n")
    found = read_file(str(recipe), "")
    assert asyncio.run(Guarded(found.scores[0])(TASK, path("abcd"))) == 7.0


def test_a_worker_sees_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    monkeypatch.setenv("JUDGE_KEY", "shown")
    made = WorkerPool(1, env=("JUDGE_KEY",))
    seen = made.submit(rewards.surroundings, seconds=5).result(timeout=60).value
    assert "MY_API_KEY" not in seen["names"]
    assert {"PATH", "HOME", "JUDGE_KEY"} <= set(seen["names"])
    assert len(seen["names"]) < 20
    assert seen["listing"] == []
    assert seen["home"] == seen["folder"] != os.getcwd()
    assert File(seen["folder"]).is_dir()
    made.close()
    for _ in range(100):
        if not File(seen["folder"]).exists():
            break
        time.sleep(0.05)
    assert not File(seen["folder"]).exists()


def test_limits_on_files(two: WorkerPool) -> None:
    outcome = two.submit(rewards.open_many, 2000, seconds=5).result(timeout=60)
    assert (outcome.cause, "Too many open files" in str(outcome.failure)) == ("raised", True)
    outcome = two.submit(rewards.write_much, 2**29, seconds=20, wall=60).result(timeout=90)
    assert outcome.value is None
    assert "File too large" in str(outcome.failure) or outcome.cause == "died"
    assert two.submit(rewards.write_much, 2**20, seconds=5).result(timeout=60) == Outcome(2**20)


def test_no_network_where_the_system_can_take_it_away() -> None:
    closed, opened = WorkerPool(1), WorkerPool(1, network=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        apart = closed.submit(sandbox.state, seconds=5).result(timeout=60).value
        assert opened.submit(rewards.dial, port, seconds=5).result(timeout=60) == Outcome("reached")
        if not apart["namespace"]:
            pytest.skip("needs user namespaces, which this system refuses")
        assert closed.submit(rewards.dial, port, seconds=5).result(timeout=60).value != "reached"
    assert sandbox.in_words(apart).endswith("no network")
    closed.close()
    opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_child_in_a_session_of_its_own_dies_too(two: WorkerPool, tmp_path: File) -> None:
    note = tmp_path / "child"
    assert two.submit(rewards.hide_child, str(note), seconds=0.5).result(timeout=60).cause == "timeout"
    assert gone(int(note.read_text()))


def test_a_step_has_a_budget_and_what_falls_to_it_is_counted(two: WorkerPool) -> None:
    ask(two, rewards.length, "warm")

    async def main() -> list[Outcome]:
        hanging = [two.run(rewards.spin, TASK, path("spin"), seconds=0.3, wall=30) for _ in range(12)]
        return await asyncio.gather(*hanging)

    with grading_budget(0.7) as budget:
        outcomes = asyncio.run(main())
        after = two.submit(rewards.square, 3, seconds=5).result(timeout=60)
    refused = [outcome for outcome in outcomes if outcome.cause == "refused"]
    cut = [outcome for outcome in outcomes if outcome.cause == "timeout"]
    assert len(cut) + len(refused) == 12
    assert 3 <= len(cut) <= 4, "two at a time, until 0.7 seconds are spent"
    assert refused[0].failure == "the 0.7 seconds of grading of this step are spent"
    assert refused[0].cut
    assert after.cause == "refused"
    assert budget.metrics() == {"grades_cut": len(cut), "graders_lost": 0, "grades_refused": len(refused) + 1}
    assert two.submit(rewards.square, 3, seconds=5).result(timeout=60) == Outcome(9), "the next step has its own"


def test_equal_calls_of_a_step_are_made_once(two: WorkerPool, tmp_path: File) -> None:
    note = tmp_path / "runs"

    async def main() -> list[Outcome]:
        return await asyncio.gather(*(two.run(rewards.note_and_answer, str(note), n % 3, seconds=5, once=True) for n in range(30)))

    with grading_budget():
        assert [outcome.value for outcome in asyncio.run(main())] == [n % 3 for n in range(30)]
        assert sorted(note.read_text().split()) == ["0", "1", "2"]
    with grading_budget():
        asyncio.run(main())
    assert len(note.read_text().split()) == 6


@pytest.mark.parametrize(("number", "again"), [(signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGSEGV, False)])
def test_a_grader_that_is_killed_in_mid_call_is_asked_again(two: WorkerPool, tmp_path: File, number: signal.Signals, again: bool) -> None:
    with grading_budget() as budget:
        outcome = two.submit(rewards.die_once, str(tmp_path / "died"), int(number), seconds=5).result(timeout=60)
        assert (outcome.value, outcome.cause) == ((1.0, None) if again else (None, "died"))
        for _ in range(2):
            (tmp_path / "died").unlink(missing_ok=True)
            two.submit(rewards.crash, TASK, path(""), seconds=5).result(timeout=60)
    assert budget.metrics()["graders_lost"] == (2 if again else 3)


def test_workers_that_never_start_are_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BOOT", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)  # {path} {fd} {parent} {gigabytes} {network}")
    with pytest.raises(GraderLost, match=r"3 grading processes ended before they were ready, the last with SIGKILL; the system kills them"):
        asyncio.run(Guarded(rewards.length, workers=1, gigabytes=1.5)(TASK, path("a")))
    monkeypatch.undo()
    worker_pool(1, 1.5).close()
