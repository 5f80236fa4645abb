"""Kernels compiled for this machine: kept, shared by processes, and what is said where they cannot be had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import KERNELS, mixed, run, small, worst
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.native import build
from ramulus.run.doctor import machine

MANY = 2**26


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernels compiled so far."""
    monkeypatch.setenv("RAMULUS_CACHE", str(tmp_path / "kernels"))
    build.opened.cache_clear()
    yield tmp_path
    build.opened.cache_clear()


def test_without_a_compiler_torch_decodes(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.Unavailable, match=r"CC=no-such-compiler.*install one"):
        build.library("decode.c", {})
    assert dict(machine())["kernels for CPUs"].startswith("none: no C compiler")
    model, requests = small(), mixed(6)
    engine = LocalEngine(model, slots=4, memory=MANY)
    assert engine.forward.name == "fused"
    assert worst(model, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo broken >&2; exit 1", "could not compile the kernels: broken"), ("exit 0", "exit status 0")],
)
def test_a_compiler_that_fails_says_why(script: str, said: str, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = empty / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(build.Unavailable, match=said):
        build.library("decode.c", {})
    assert not list((empty / "kernels").iterdir())
    compiler.unlink()
    with pytest.raises(build.Unavailable, match=said):  # and is not asked again in this process
        build.library("decode.c", {})


@KERNELS
def test_a_compiler_without_openmp_will_do(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac: one thread then does all the work."""
    compiler = empty / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {build.compiler()[0]} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    model, requests = small(), mixed(6)
    engine = LocalEngine(model, slots=4, memory=MANY, threads=2)
    assert engine.forward.name == "compiled"
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_the_environment_switches_them_off(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    assert LocalEngine(small(), slots=2, memory=MANY).forward.name == "fused"
    assert "RAMULUS_NATIVE=0" in build.why()


@KERNELS
def test_a_library_that_is_broken_is_named(empty: Path) -> None:
    target = build.built("draw.c")
    target.write_bytes(b"not a library")
    with pytest.raises(build.Unavailable, match="cannot be loaded"):
        build.library("draw.c", {})


def test_without_a_home_torch_decodes(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAMULUS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.Unavailable, match="home directory"):
        build.library("draw.c", {})


def test_a_folder_that_cannot_be_written_is_named(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty / "file").write_text("")
    monkeypatch.setenv("RAMULUS_CACHE", str(empty / "file" / "below"))
    with pytest.raises(build.Unavailable, match="cannot be loaded or kept"):
        build.library("draw.c", {})


@KERNELS
def test_several_processes_build_at_once(empty: Path) -> None:
    """Each finds a whole library, and one is left."""
    code = "from ramulus.native.build import library; assert library('draw.c', {}).ramulus_entropy"
    environment = os.environ | {"RAMULUS_CACHE": str(empty / "kernels")}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [child.wait(100) for child in children] == [0, 0, 0]
    (left,) = (empty / "kernels").iterdir()
    assert ctypes.CDLL(str(left)).ramulus_entropy


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs a list of a process's threads")
@KERNELS
def test_the_cache_loses_what_nobody_used(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MOST_KEPT", 3)
    cache, now = empty / "kernels", time.time()
    cache.mkdir()

    def kept(name: str, days: float) -> Path:
        path = cache / name
        path.write_bytes(b"x")
        os.utime(path, (now - days * build.DAY,) * 2)
        return path

    old = [kept(f"decode-{i:020x}.so", 31 + i) for i in range(3)]
    recent = [kept(f"attention-{i:020x}.so", 2 + i) for i in range(4)]
    today = [kept(f"draw-{i:020x}.so", 0.1) for i in range(5)]
    foreign = [kept(name, 400) for name in ("libmine.so", "notes.txt", "decode-1.so")]
    (cache / "compiling-dead").mkdir()
    os.utime(cache / "compiling-dead", (now - 2 * build.DAY,) * 2)
    (cache / "compiling-now").mkdir()
    build.library("draw.c", {})
    assert not any(path.exists() for path in [*old, *recent]), "a month, and beyond the number that is kept"
    assert all(path.exists() for path in [*today, *foreign])
    assert not (cache / "compiling-dead").exists()
    assert (cache / "compiling-now").exists()


@KERNELS
def test_a_library_that_is_used_stays_and_one_that_is_open_works_without_its_file(empty: Path) -> None:
    opened = build.library("draw.c", {})
    path = Path(opened._name)
    month_ago = time.time() - 40 * build.DAY
    os.utime(path, (month_ago, month_ago))
    assert build.built("draw.c") == path, "found, not made again"
    build.tidy(path.parent)
    assert path.exists(), "its use was noted"
    path.unlink()
    functions = [line.split("(")[0].split()[-1].lstrip("*") for line in (build.HERE / "draw.c").read_text().splitlines() if line.startswith("void ")]
    assert all(hasattr(opened, name) for name in functions if name)


@KERNELS
def test_a_library_that_vanishes_between_finding_and_opening_is_made_again(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.built("draw.c")
    found, calls = build.built, []

    def vanishing(source: str, *flags: str) -> Path:
        path = found(source, *flags)
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(build, "built", vanishing)
    assert build.opened("draw.c")._name == str(first)
    assert len(calls) == 2


@KERNELS
def test_processes_that_tidy_while_others_load(empty: Path) -> None:
    """Every library is a month old again and again while three processes open, or make and tidy."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom ramulus.native import build\n"
        "for turn in range(30):\n"
        "    build.opened.cache_clear()\n"
        "    opened = build.opened('draw.c')\n"
        "    assert not isinstance(opened, Exception), opened\n"
        "    if turn % 10 == int(sys.argv[1]):\n"
        "        for path in build.folder().glob('*.so'):\n"
        "            try: os.utime(path, (0, 0))\n"
        "            except OSError: pass\n"
        "        build.tidy(build.folder())\n"
    )
    many = [subprocess.Popen([sys.executable, "-c", script, str(i)], stderr=subprocess.PIPE, text=True) for i in range(3)]
    assert [(one.communicate(timeout=120)[1], one.returncode) for one in many] == [("", 0)] * 3


def test_a_team_that_is_given_back_ends_its_threads() -> None:
    code = (
        "import os, time, torch; from ramulus.native.openmp import release_team; torch.set_num_threads(4)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "x = torch.randn(400, 400); before = count(); first = x @ x; y = x.exp(); busy = count()\n"
        "release_team(); time.sleep(0.1); print(busy - before, count() - before)\n"
        "assert torch.get_num_threads() == 4; assert torch.equal(x @ x, first); assert torch.equal(x.exp(), y)\n"
        "assert count() == busy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0"]
