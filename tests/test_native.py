"""Kernels compiled for this machine: kept, shared by processes, and what is said where they cannot be had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
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
