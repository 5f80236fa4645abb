"""Pages of 2 MB below large blocks: asked for by the command, given by the system, and said by doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ramulus.native import memory

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
given = pytest.mark.skipif(not PAGES.is_file() or "[never]" in PAGES.read_text(), reason="this system gives no large pages")
SCRIPT = """
import re
from ramulus.native.memory import ask_for_large_pages

ask_for_large_pages()
import torch

held = [torch.ones(2**24) for _ in range(4)]
print(sum(int(kb) for kb in re.findall(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps").read())))
"""


def kilobytes(**env: str) -> int:
    """What 268 MB of tensors hold in large pages."""
    there = {name: value for name, value in os.environ.items() if name != memory.LARGE_PAGES} | env
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@given
def test_large_blocks_lie_in_large_pages() -> None:
    assert kilobytes() > 10_000  # of 268,000: a system whose memory is in pieces gives fewer


@given
def test_who_refuses_them_has_none() -> None:
    if "[always]" in PAGES.read_text():
        pytest.skip("this system gives no large pages to who asks alone")
    assert kilobytes(THP_MEM_ALLOC_ENABLE="0") < 4_096


@pytest.mark.parametrize(
    ("asked", "enabled", "words"),
    [
        ("1", None, "this system has none"),
        ("1", "always [madvise] never", "below blocks of 2 MB or more"),
        ("1", "always madvise [never]", "refused by the system"),
        ("0", "always [madvise] never", "not asked for: THP_MEM_ALLOC_ENABLE=1"),
    ],
)
def test_what_doctor_says(asked: str, enabled: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pages"
    if enabled is not None:
        folder.mkdir()
        (folder / "enabled").write_text(enabled)
    monkeypatch.setattr(memory, "PAGES", folder)
    monkeypatch.setenv(memory.LARGE_PAGES, asked)
    memory.ask_for_large_pages()
    assert os.environ[memory.LARGE_PAGES] == asked  # who said so is heeded
    assert memory.large_pages().startswith(words)
