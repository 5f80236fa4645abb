"""What of a machine this process may use: its processors, the time and memory that control groups grant, and who keeps it busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ramulus.native import memory, processors
from ramulus.native.processors import busy_cores, cores, multiplies_bfloat16

pytestmark = pytest.mark.skipif(not hasattr(processors.os, "sched_getaffinity"), reason="the system tells no process its processors")


def tree_of(folder: Path, files: dict[str, str]) -> None:
    """Write files by their paths."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the control groups of this process, out of what it is told and the files of its groups."""

    def make(own: str, files: dict[str, str]) -> None:
        tree_of(tmp_path, {"own": own, **{f"mount/{name}": text for name, text in files.items()}})
        monkeypatch.setattr(memory, "CGROUP", tmp_path / "mount")
        monkeypatch.setattr(memory, "OWN", tmp_path / "own")

    return make


def stat(work: dict[int, int], idle: int = 1000) -> str:
    """/proc/stat of processors that have worked so many ticks."""
    lines = [f"cpu{number} {ticks} 0 0 {idle} 7 0 0 0 0 0" for number, ticks in work.items()]
    return "\n".join([f"cpu  {sum(work.values())} 0 0 {idle} 7 0 0 0 0 0", *lines, "intr 1 2 3", ""])


@pytest.mark.parametrize(("mine", "expected"), [({0, 1}, 0.0), ({1, 2, 3}, 2.0), (set(range(12)), 10.0)])
def test_only_the_processors_of_this_process_count(mine: set[int], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve, all but the first two are kept busy."""
    file, hertz = tmp_path / "stat", processors.os.sysconf("SC_CLK_TCK")
    file.write_text(stat(dict.fromkeys(range(12), 50)))
    monkeypatch.setattr(processors, "STAT", file)
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: mine)
    after = stat({number: 50 + hertz * (number > 1) for number in range(12)})
    monkeypatch.setattr(processors.time, "sleep", lambda seconds: file.write_text(after))
    clock = iter((5.0, 6.0))
    monkeypatch.setattr(processors.time, "monotonic", lambda: next(clock))
    assert busy_cores() == expected


@pytest.mark.skipif(not processors.STAT.exists(), reason="needs Linux's /proc/stat")
def test_a_process_that_works_is_seen() -> None:
    work = "import time\nuntil = time.monotonic() + 20\nwhile time.monotonic() < until: pass"
    with subprocess.Popen([sys.executable, "-c", work]) as worker:
        try:
            assert max(busy_cores() for _ in range(8)) > 0.5
        finally:
            worker.kill()


def test_where_nobody_says_how_busy_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processors, "STAT", tmp_path / "none")
    assert busy_cores() == 0.0


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, 16),
        ("0::/", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/", {"cpu.max": "max 100000\n"}, 16),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "300000 100000", "other/cpu.max": "10000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "9900000 100000"}, 16),
        ("4:cpu,cpuacct:/pod/x\n0::/", {"cpu/pod/x/cpu.cfs_quota_us": "-1\n", "cpu/pod/x/cpu.cfs_period_us": "100000\n"}, 16),
        ("4:cpu,cpuacct:/x\n0::/", {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "50000"}, 5),
        ("4:cpu:/docker/abc\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/docker/abc/in\n", {"cpu/in/cpu.cfs_quota_us": "200000", "cpu/in/cpu.cfs_period_us": "100000"}, 2),
        ("0::/../../x\n", {"cpu.max": "700000 100000"}, 7),
    ],
)
def test_cores_are_what_control_groups_grant(own: str, files: dict[str, str], expected: int, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(16)))
    groups(own, files)
    assert cores() == expected


FIRST = "memory.limit_in_bytes", "memory.usage_in_bytes"
SECOND = "memory.max", "memory.current"


def limited(folder: str, names: tuple[str, str], limit: int | str, usage: int, stat: str = "") -> dict[str, str]:
    """The files of a group with a limit of memory."""
    return {f"{folder}{names[0]}": f"{limit}\n", f"{folder}{names[1]}": f"{usage}\n", f"{folder}memory.stat": stat}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", limited("a/b/", SECOND, 9000, 500), 8500),
        ("0::/a/b", limited("a/b/", SECOND, "max", 500) | limited("a/", SECOND, 5000, 800, "inactive_file 300"), 4500),
        ("0::/a/b", limited("a/b/", SECOND, 4000, 500) | limited("a/", SECOND, 5000, 4900) | limited("c/", SECOND, 10, 9), 100),
        ("7:memory:/a\n0::/", limited("memory/a/", FIRST, 900, 600, "inactive_file 0\ntotal_inactive_file 100"), 400),
        ("7:memory:/docker/a\n", limited("memory/", FIRST, 900, 600), 300),
    ],
)
def test_memory_is_what_the_control_groups_leave(own: str, files: dict[str, str], expected: int, groups: Any) -> None:
    groups(own, files)
    assert memory.free_memory() == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512bw amx_tile amx_int8\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: avx2 avx_vnni amx_bf16\n", True),
        ("Features\t: fp asimd sve i8mm\n", False),
        ("Features\t: fp asimd i8mm bf16\n", True),
    ],
)
def test_a_processor_multiplies_bfloat16_by_an_instruction(said: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{said}")
    monkeypatch.setattr(processors, "CPUINFO", tmp_path / "cpuinfo")
    assert multiplies_bfloat16.__wrapped__() is expected
