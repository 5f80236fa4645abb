"""Sweeps: what is planned and refused, and real runs that are stopped, killed, failed and gone on with."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ramulus.cli import main
from ramulus.native.memory import free_memory
from ramulus.native.processors import cores
from ramulus.run.config.resume import prepare
from ramulus.run.interrupt import ECHO, Interrupt
from ramulus.run.launch import launch
from ramulus.run.sweep import job_pool, sweep
from ramulus.run.sweep.job_pool import Job, JobPool
from ramulus.run.sweep.sweep import allot, label_of, planned_jobs
from ramulus.run.sweep.sweep import sweep as run_sweep

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_recipe.py")
ENV = os.environ | {"PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

MEASURED = ("seconds", "cpu_seconds", "memory", "gpu")  # what differs from run to run


@pytest.mark.parametrize(
    ("recipe", "label"),
    [
        ("grpo", "grpo"),
        ("grpo:small", "grpo-small"),
        ("grpo:recipe", "grpo"),
        ("path/easy.py", "easy"),
        ("path/easy.py:grpo", "easy-grpo"),
        ("/tmp/my recipe (2).py:grpo", "my-recipe-2-grpo"),
        ("../...py", "recipe"),
    ],
)
def test_labels_are_safe_folders(recipe: str, label: str):
    assert label_of(recipe) == label


def test_the_plan_goes_seed_by_seed(tmp_path: Path):
    jobs = planned_jobs(["grpo:small", "dapo:small"], ["steps=3"], [4, 0], tmp_path, threads=2)
    assert [job.name for job in jobs] == [
        "grpo-small seed 4",
        "dapo-small seed 4",
        "grpo-small seed 0",
        "dapo-small seed 0",
    ]
    job = jobs[1]
    assert job.folder == tmp_path / "dapo-small" / "seed-4"
    assert job.log == tmp_path / "dapo-small" / "seed-4.log"
    words = ["train", "dapo:small", f"out={job.folder}", "seed=4", "steps=3", "threads=2", "--resume"]
    assert job.command == [sys.executable, "-m", "ramulus.cli", *words]
    assert (job.stages[0].seed, job.stages[0].steps, job.total()) == (4, 3, 3)


def test_threads_of_the_user_and_of_the_recipe_stay(tmp_path: Path):
    (asked,) = planned_jobs(["grpo:small"], ["threads=3"], [0], tmp_path, threads=1)
    (written,) = planned_jobs([RECIPE], [], [0], tmp_path, threads=2)  # it says threads=1 itself
    assert asked.extra == written.extra == ()


def test_processes_and_threads():
    assert allot(None, None) == (cores(), 1)
    assert allot(3, 5) == (3, 5)
    assert allot(1, None) == (1, cores())
    assert allot(None, 2 * cores()) == (1, 2 * cores())
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        allot(0, None)


@pytest.mark.parametrize(
    ("recipes", "overrides", "seeds", "said"),
    [
        ([], [], [0], "at least one recipe"),
        (["grpo"], [], [], "one seed"),
        (["grpo"], [], [1, 1], "seeds must be different"),
        (["grpo"], [], [-1], "not negative"),
        (["grpo", "grpo:recipe"], [], [0], "two recipes have the label grpo"),
        (["grpo"], ["seed=3"], [0], "use --seeds"),
        (["grpo"], ["out=here"], [0], "--out"),
        (["grpo", "dapo"], ["output_dir=here"], [0], "output_dir=here: a sweep sets it"),
        (["grpo"], ["--out_dir=here"], [0], "a sweep sets it"),
        (["sft_then_grpo"], ["grpo.seed=7"], [0], "grpo.seed=7: a sweep sets it"),
        (["sft_then_grpo"], ["grpo.output=here"], [0], "a sweep sets it"),
        (["grpo", "grop"], [], [0], "Did you mean grpo"),
        (["grpo:small", "dapo:small"], ["stepz=3"], [0], "stepz"),
    ],
)
def test_nothing_starts_before_all_is_checked(
    tmp_path: Path, recipes: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], said: str
):
    with pytest.raises(ValueError, match=said):
        run_sweep(recipes, overrides, seeds, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a sweep whose one run has a run.json."""
    (job,) = planned_jobs([RECIPE], ["steps=3"], [0], tmp_path, threads=1)
    prepare(RECIPE, [f"out={job.folder}", "seed=0", "steps=3"]).save()
    return tmp_path


def test_the_same_run_goes_on(saved: Path):
    (job,) = planned_jobs([RECIPE], ["steps=3"], [0], saved, threads=4)
    assert not job.finished()
    assert job.extra == ()  # it keeps the threads that it began with
    (job.folder / "summary.json").write_text("{}")
    assert job.finished()


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (RECIPE, ["steps=4"], "steps was 3, is now 4"),
        (RECIPE, [], "steps was 3, is now not set"),
        (RECIPE, ["steps=3", "minibatches=1"], "minibatches was not set, is now 1"),
        (RECIPE, ["steps=3", "threads=2"], "threads was not set, is now 2"),
    ],
)
def test_another_run_is_refused(saved: Path, recipe: str, overrides: list[str], said: str):
    with pytest.raises(ValueError, match=f"holds another run: {said}.*choose another --out"):
        planned_jobs([recipe], overrides, [0], saved, threads=1)


def test_another_or_an_edited_recipe_is_refused(saved: Path):
    path = saved / "run_recipe" / "seed-0" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"recipe": "grpo"}))
    with pytest.raises(ValueError, match="its recipe is grpo, not "):
        planned_jobs([RECIPE], ["steps=3"], [0], saved, threads=1)
    content["stages"][0]["minibatches"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="rl: minibatches was 7, is now 2"):
        planned_jobs([RECIPE], ["steps=3"], [0], saved, threads=1)
    del content["stages"][0]["minibatches"]  # a field that came with a newer version is no difference
    path.write_text(json.dumps(content))
    assert len(planned_jobs([RECIPE], ["steps=3"], [0], saved, threads=1)) == 1


def test_steps_are_counted_as_they_come(saved: Path):
    (job,) = planned_jobs([RECIPE], ["steps=3"], [0], saved, threads=1)
    assert job.steps() == 0
    path = job.folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert job.steps() == 1
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert job.steps() == 2
    path.write_text('{"step": 1}\n')  # cut back to the last checkpoint
    assert job.steps() == 1


def test_a_folder_is_swept_once_at_a_time(tmp_path: Path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="still at work"):
            run_sweep([RECIPE], ["steps=1"], [0], tmp_path, Console(quiet=True))
    assert not (tmp_path / "sweep.json").exists()


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "grpo", "steps=many", "--seeds", "0", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("ramulus: steps")


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """A sweep of two seeds in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "ramulus.cli",
        "sweep",
        RECIPE,
        *words,
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
        "--jobs",
        "2",
        "--threads",
        "1",
    ]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.split("/")[0] not in MEASURED} for line in lines]


def wait_for_steps(out: Path, steps: int) -> None:
    """Until both seeds have made so many steps."""
    files = [out / "run_recipe" / f"seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    end = time.monotonic() + 200
    while not all(file.exists() and file.read_bytes().count(b"\n") >= steps for file in files):
        assert time.monotonic() < end
        time.sleep(0.05)


@dataclass
class Stubborn(Job):
    """A run that hears no request to end, and has begun a process that outlives it."""

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", f"trap '' TERM; sleep 60 & touch '{self.folder}'; wait"]


@pytest.mark.parametrize("starting", [False, True])
def test_a_second_signal_ends_all_that_the_runs_began(starting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one that comes while the run is being started, which nobody knows of yet."""
    job = Stubborn("stubborn", 0, "", tmp_path / "began", (), (), ())

    def signals() -> None:
        while not job.folder.exists():
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(ECHO + 0.1)

    def start(*words: Any, **options: Any) -> subprocess.Popen:
        process = subprocess.Popen(*words, **options)
        signals()
        return process

    if starting:
        monkeypatch.setattr(job_pool, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": start}))
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the run and its process hold it too
        pool = JobPool([job], 1, dict(os.environ), lock, Console(quiet=True))
        if not starting:
            threading.Thread(target=signals, daemon=True).start()
        with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
            pool.work(interrupt)
    end = time.monotonic() + 20
    with open(tmp_path / "lock") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end, "a process of the run is still there"
                time.sleep(0.05)


@dataclass
class Frugal(Job):
    """A run that writes down what it may take of memory."""

    @property
    def command(self) -> list[str]:
        words = f"from ramulus.native.memory import *; from pathlib import Path; Path({str(self.folder)!r}).write_text(str(free_memory()))"
        return [sys.executable, "-c", words]


def test_runs_beside_each_other_share_what_was_free_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "planned_jobs", lambda *_: [Frugal("frugal", n, "", tmp_path / f"free-{n}", (), (), ()) for n in range(3)])
    for jobs, share in ((2, 2), (1, 1)):
        before = free_memory()
        console = Console(record=True, width=200, file=io.StringIO())
        assert run_sweep([RECIPE], ["steps=1"], [0, 1, 2], tmp_path / str(jobs), console, jobs=jobs) == 0
        assert ("2 at once, each with" in console.export_text()) == (jobs == 2)
        taken = [int((tmp_path / f"free-{n}").read_text()) for n in range(3)]
        assert all(each == pytest.approx(before / share, rel=0.2) for each in taken), (before, taken)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_as_it_was")
def test_stopped_then_killed_then_finished(tmp_path: Path):
    words = ("steps=100", "save_every=5", "eval_every=0")
    out = tmp_path / "out"
    running = start(out, *words)
    wait_for_steps(out, 5)
    running.send_signal(signal.SIGTERM)
    status, said = finish(running)
    assert status == 128 + signal.SIGTERM
    assert "go on with\n  ramulus sweep" in said
    assert "FAILED" not in said
    share, *ran = (float(re.search(r"(?:with|of) (\d+\.\d) GB", text)[1]) for text in (said, *(log.read_text() for log in out.rglob("seed-*.log"))))
    assert [free <= share for free in ran] == [True, True]
    before = [len(rows(out / "run_recipe" / f"seed-{seed}")) for seed in (0, 1)]
    assert all(5 <= count < 100 for count in before)

    running = start(out, *words)
    wait_for_steps(out, max(before) + 5)
    running.kill()  # its runs go on alone, and no other sweep may start them a second time
    with pytest.raises(ValueError, match="still at work"):
        run_sweep([RECIPE], words, [0, 1], out, Console(quiet=True))
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # free when the last of them has ended
    assert finish(start(out, *words))[1].startswith("2 runs, 2 of them finished already")
    for seed in (0, 1):
        whole = tmp_path / f"whole-{seed}"
        assert launch(RECIPE, [f"out={whole}", f"seed={seed}", *words], False, True, Console(quiet=True)) == 0
        assert rows(whole) == rows(out / "run_recipe" / f"seed-{seed}")
    made = json.loads((out / "sweep.json").read_text())
    assert (made["labels"], made["overrides"], made["seeds"]) == (["run_recipe"], list(words), [0, 1])


@pytest.mark.slow
def test_a_failing_run_stops_no_other(tmp_path: Path):
    recipe = tmp_path / "two.py"
    recipe.write_text(
        f"from ramulus.run.config.find import find\nfrom dataclasses import replace\nfrom ramulus.tasks.files import File\n"
        f"def good(): return find({RECIPE!r}).rl()\n"
        f"def bad(): return replace(good(), tasks=File('nowhere.jsonl'))\n"
    )
    words = [f"{recipe}:bad", f"{recipe}:good", "steps=2", "--seeds", "0", "--out", str(tmp_path / "out"), "--jobs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "ramulus.cli", "sweep", *words], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "two-bad seed 0 ended with status 2; the end of" in done.stdout
    assert "nowhere.jsonl" in done.stdout
    assert "1 of 2 runs are finished" in done.stdout
    assert (tmp_path / "out" / "two-good" / "seed-0" / "summary.json").exists()
