"""Large blocks that tensors leave on a CPU: kept for the next ones, given back, never two at once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramulus.native import blocks, memory
from ramulus.native.blocks import drop_blocks, idle_bytes, keep_blocks, leave_blocks

pytestmark = pytest.mark.skipif(blocks.blocks_refused() != "", reason="blocks are not kept here")
MEGABYTE = 2**20


@pytest.fixture
def kept() -> Iterator[None]:
    """While a test runs."""
    assert keep_blocks(False)
    yield
    leave_blocks()


def block(megabytes: float, value: int) -> torch.Tensor:
    """Filled with a number."""
    return torch.full((int(megabytes * MEGABYTE),), value, dtype=torch.uint8)


def alone(code: str, **env: str) -> str:
    """What a process of its own prints in which blocks are kept."""
    imports = "import os, resource, threading, torch\nfrom ramulus.native.blocks import *\nfrom ramulus.native.memory import *\n"
    begun = f"{imports}assert keep_blocks(False)\n"
    done = subprocess.run([sys.executable, "-c", begun + code], env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return done.stdout


@given(st.lists(st.tuples(st.integers(0, 11), st.floats(0.5, 9)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_what_was_written_to_them(moves: list[tuple[int, float]]) -> None:
    """Twelve places; a place is emptied, or filled by a block of its own number. No two blocks share a byte, whatever was freed before."""
    assert keep_blocks(False)
    places: dict[int, torch.Tensor] = {}
    try:
        for number, (place, megabytes) in enumerate(moves):
            if place in places:
                del places[place]
            else:
                places[place] = block(megabytes, number % 251)
                places[place][0] = number % 251
            assert all(bool((filled == filled[0]).all()) for filled in places.values())
    finally:
        places.clear()
        leave_blocks()
    assert blocks._keepers or idle_bytes() == 0


def test_what_is_freed_is_joined_and_cut_again(kept: None) -> None:
    """Neighbours become one block; a smaller one leaves its rest."""
    drop_blocks()
    before = idle_bytes()
    one = block(96, 1)
    where = one.data_ptr()
    del one
    parts = [block(24, i) for i in range(4)]
    assert sorted(part.data_ptr() - where for part in parts) == [i * 24 * MEGABYTE for i in range(4)]
    del parts[1], parts[1]  # the second and the third: neighbours
    assert block(48, 5).data_ptr() == where + 24 * MEGABYTE
    parts.clear()
    assert idle_bytes() - before >= 96 * MEGABYTE
    drop_blocks()
    assert idle_bytes() - before < 2 * MEGABYTE


def test_a_block_is_touched_for_the_first_time_once() -> None:
    """Page faults of a loop that makes and frees a block of 64 MB."""
    told = alone("""
one = torch.ones(2**24)
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one = one + 1
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[2:]))
""")
    assert int(told) < 100  # of 16,384 pages


def test_no_more_is_held_than_was_in_use_at_once() -> None:
    """Rounds of blocks of other sizes each time, 200 to 260 MB at once."""
    told = alone("""
import random
draw, peak, used = random.Random(0), 0, 0
before = held_bytes(os.getpid())
for round in range(30):
    blocks = []
    while sum(map(len, blocks)) < 200 * 2**20:
        blocks.append(torch.ones(draw.randrange(2**20, 2**24 * 4), dtype=torch.uint8))
    used = max(used, sum(map(len, blocks)))
    peak = max(peak, held_bytes(os.getpid()) - before)
    draw.shuffle(blocks)
    while blocks:
        blocks.pop()
    assert idle_bytes() < 400 * 2**20
give_back()
print(peak / used, (held_bytes(os.getpid()) - before) / 2**20)
""")
    peak, left = map(float, told.split())
    assert peak < 1.35
    assert left < 8


def test_where_memory_ends_what_waits_is_given_back_first() -> None:
    """Under a limit: what fits once the rest is given back, and torch's own error where nothing helps."""
    told = alone("""
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 700 * 2**20, -1))
small = [torch.ones(2**26, dtype=torch.uint8) for _ in range(8)]  # 512 MB
del small[::2]  # 256 MB wait, in pieces
large = torch.ones(350 * 2**20, dtype=torch.uint8)
try:
    torch.ones(2**30, dtype=torch.uint8)
except RuntimeError as error:
    print(allocation_failed(error), idle_bytes() < 2**21, int(large[-1]))
""")
    assert told.split() == ["True", "True", "1"]


def test_threads_and_children_have_blocks_of_their_own() -> None:
    """Four threads at once; and a process that is forked meanwhile."""
    told = alone("""
wrong = []
def work(number):
    for i in range(150):
        mine = torch.full((2**20 + 70_000 * number,), number, dtype=torch.uint8)
        more = torch.full((2**21,), 100 + number, dtype=torch.uint8)
        if not bool((mine == number).all() and (more == 100 + number).all()):
            wrong.append(i)
torch.set_num_threads(1)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[thread.start() for thread in threads]
codes = []
for _ in range(5):
    if not (child := os.fork()):
        ok = all(bool((torch.empty(2**22, dtype=torch.uint8).fill_(7) == 7).all()) for _ in range(5))
        os._exit(0 if ok else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
[thread.join() for thread in threads]
print(len(wrong), codes)
""", OMP_NUM_THREADS="1")  # fmt: skip
    assert told.strip() == "0 [0, 0, 0, 0, 0]"


def test_the_last_keeper_leaves_torch_as_it_was() -> None:
    told = alone("""
keep_blocks(True)
one = torch.ones(2**24)
del one
waiting = idle_bytes()
leave_blocks()
print(waiting == idle_bytes() > 2**26 - 1)
held = torch.ones(2**24)
leave_blocks()
print(idle_bytes() < 2**21)
one = torch.ones(2**24)  # torch's
del one, held
print(idle_bytes() < 2**21, int(torch.ones(2**24).sum()) == 2**24)
""")
    assert set(told.split()) == {"True"}


def test_what_waits_is_given_back_where_it_is_more_than_is_free(kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little else free it goes after a step; with much it stays until all is to go."""
    drop_blocks()
    before = idle_bytes()
    monkeypatch.setattr(memory, "_limit", lambda: [])
    for free, stays in ((100, False), (400, True)):
        one = block(200, 1)
        del one
        monkeypatch.setattr(memory, "_container", lambda free=free: [free * MEGABYTE])
        memory.give_back(blocks=False)
        assert (idle_bytes() - before >= 200 * MEGABYTE) == stays
        assert memory.free_memory() <= free * MEGABYTE
    memory.give_back()
    assert idle_bytes() - before < 2 * MEGABYTE


def test_who_frees_by_hand_what_either_gave_is_served() -> None:
    """oneDNN's tensors are freed by whatever allocator is there by then."""
    told = alone("""
late = torch.ones(600, 1024).to_mkldnn()
leave_blocks()
early = torch.ones(700, 1024).to_mkldnn()
del late
keep_blocks(False)
del early
print(int(torch.ones(600, 1024).to_mkldnn().to_dense().sum()))
storage = torch.ones(2**21).untyped_storage()
try:
    storage.resize_(2**63 - 1)
except RuntimeError as error:
    print(allocation_failed(error))
""")
    assert told.split() == [str(600 * 1024), "True"]


@pytest.mark.parametrize("name", ["RAMULUS_KEEP_BLOCKS", "RAMULUS_NATIVE"])
def test_who_says_so_leaves_them_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_kept", None)
    monkeypatch.setenv(name, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not keep_blocks(False)
    assert blocks.blocks_refused() == f"{name}=0 leaves them to torch"
    assert idle_bytes() == 0
    drop_blocks()


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_kept", None)
    monkeypatch.setattr(blocks, "_flags", lambda: ("-DOTHER",))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"memory that tensors leave is not kept: no C compiler \(CC=no-such-compiler\) was found"):
        assert not keep_blocks(False)
    assert "a quarter longer" in blocks.blocks_refused()
