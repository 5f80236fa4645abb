"""How much memory this process may still take, whether an allocation failed, and giving back what is not used."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ramulus.native.blocks import drop_blocks, idle_bytes

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""The files of a control group's limit and of what it uses, by version 2 and 1."""
LIMIT = "RAMULUS_MEMORY_MB"  # of the environment: what this process and those that it starts may take together, whatever else is free
SHARES = "RAMULUS_GPU_SHARES"  # of the environment: processes among which a GPU is shared alike
GB = 10**9  # bytes
GIVES_BACK = 2**26  # bytes of weights from which on memory is given back after a step
_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of the environment: torch reads it at its first allocation
PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where Linux says whether it has large pages
CACHED = ("inactive_file", "active_file")  # of a container's memory.stat: given back when somebody needs it


def free_memory() -> int:
    """Bytes that can be taken now without swapping: what the system calls available, or less
    where the limit of a control group (a container's) or LIMIT leaves less. What waits for torch's next blocks is not among them.

    Where the system does not say, half of the machine's memory; where it does not say that either, 2 GiB.
    """
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*(available or [machine_memory() // 2]), *_container(), *_limit()])


def _limit() -> list[int]:
    """What LIMIT leaves; [] without one. ValueError where it is no number."""
    megabytes = os.environ.get(LIMIT, "")
    if megabytes and not megabytes.isdecimal():
        raise ValueError(f"{LIMIT}={megabytes} in the environment is no number of MB: set one, such as 8000, or leave it out")
    return [max(0, int(megabytes) * 2**20 - held_bytes(os.getpid()))] if megabytes else []


def held_bytes(process: int) -> int:
    """Bytes that a process and those below it hold for themselves; 0 where the system does not say."""
    below = Path(f"/proc/{process}")
    try:
        lines = [line.split() for line in (below / "status").read_text().splitlines() if line.startswith(("RssAnon:", "RssShmem:"))]
        children = [int(child) for task in (below / "task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # it has ended, or this is no Linux
        return 0
    return sum(int(words[1]) * 1024 for words in lines) + sum(map(held_bytes, children))


def free_on(device: object) -> int:
    """Bytes that this process may still take on a device of torch: on a GPU what is free and what its own allocator holds unused, or its share."""
    if not str(device).startswith("cuda"):
        return free_memory()
    import torch

    mine = torch.cuda.memory_allocated(str(device))
    free, whole = torch.cuda.mem_get_info(str(device))
    return min(int(free) + torch.cuda.memory_reserved(str(device)) - mine, int(whole) // int(os.environ.get(SHARES, 1)) - mine)


def shared_among(processes: int) -> dict[str, str]:
    """What says in the environment of each of so many processes that they share what is free now."""
    return {LIMIT: str(free_memory() // processes // 2**20), SHARES: str(processes)} if processes > 1 else {}


def free_there(gpu: bool) -> tuple[int, int]:
    """Bytes that a process somewhere may take of its machine's memory, and of its GPU's if it has one."""
    return free_memory(), free_on("cuda") if gpu else 0


def machine_memory() -> int:
    """Bytes of memory that this machine has; where the system does not say, 4 GiB."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**32


def groups(controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, those around its own too; of version 2, and of version 1 those of a controller.

    A container may see its own group as the root, under a name that only the system outside knows: of the path that the process is told, the
    longest end that is there counts.
    """
    lines = [line.split(":", 2)[1:] for line in OWN.read_text().splitlines()] if OWN.exists() else []
    mine = next((line for line in lines if controller in line[0].split(",")), [controller, "/"])
    second = next((path for names, path in lines if not names), "/")
    folders: list[Path] = []
    for mount, path in (("", second), ("unified", second), *((name, mine[1]) for name in {controller, mine[0]})):
        root, parts = CGROUP / mount, () if ".." in path else Path(path).parts[1:]
        ends = (root.joinpath(*parts[i:]) for i in range(len(parts)))
        own = next((folder for folder in ends if folder.is_dir()), root)
        folders += [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    return folders


def _container() -> list[int]:
    """What each limit of the control groups of this process leaves."""
    return [left for folder in groups("memory") for names in LIMITS if (left := _left(folder, *names)) is not None]


def _left(folder: Path, limit: str, usage: str) -> int | None:
    """Bytes that a control group may still take; None without a limit."""
    try:
        most, used, stat = ((folder / name).read_text() for name in (limit, usage, "memory.stat"))
    except OSError:
        return None
    if most.strip() == "max":
        return None
    parts = dict(line.split()[:2] for line in stat.splitlines())
    cached = sum(int(parts.get(f"total_{name}", parts.get(name, 0))) for name in CACHED)  # of version 1 those of the groups below are apart
    return max(0, int(most) - max(0, int(used) - cached))


class OutOfMemory(RuntimeError):
    """Memory did not hold what was asked for; whoever raises it has let go of what was begun."""

    def __init__(self, what: str) -> None:
        super().__init__(what if "out of memory" in what else f"out of memory: {what}")


def allocation_failed(error: BaseException) -> bool:
    """Whether an error of Python, numpy, torch, oneDNN or CUDA says that there was no memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError | OutOfMemory) or (isinstance(error, RuntimeError) and any(words in text for words in _FAILED))


_FAILED = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "alloc_failed",
    "could not create a memory", "failed to allocate", "unable to allocate",
)  # fmt: skip


@functools.cache
def _of_c(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none."""
    try:
        return getattr(ctypes.CDLL(None), name)  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None


def give_back(blocks: bool = True) -> None:
    """Return to the system what has been freed and the C library keeps; of torch's blocks that wait, on a CPU, all, or `blocks=False` those
    that are more than what is free besides."""
    if (trim := _of_c("malloc_trim")) is not None:
        trim(0)
    if blocks or idle_bytes() > free_memory():
        drop_blocks()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def large_pages_refused() -> bool:
    """Whether somebody wants no large pages."""
    return os.environ.get(LARGE_PAGES) == "0"


def ask_for_large_pages() -> None:
    """Have torch, if it has not allocated yet, ask the system for pages of 2 MB below blocks of as much or more.

    An update touches much memory for the first time, page by page: by pages of 4 kB that takes up to a third of its time.
    """
    if PAGES.is_dir():
        os.environ.setdefault(LARGE_PAGES, "1")


def large_pages() -> str:
    """Whether torch gets large pages here, in words."""
    if not PAGES.is_dir():
        return "this system has none"
    if os.environ.get(LARGE_PAGES) != "1":
        return f"not asked for: {LARGE_PAGES}=1 makes updates on a CPU faster"
    if "[never]" in (PAGES / "enabled").read_text():
        return f"refused by the system: `echo madvise > {PAGES}/enabled` as root makes updates on a CPU faster"
    return "below blocks of 2 MB or more"


def map_blocks(least: int) -> None:
    """From now on a block of so many bytes or more is the system's again once it is freed, and leaves no hole among others; where glibc is."""
    if (mallopt := _of_c("mallopt")) is not None:
        mallopt(_THRESHOLD, least)
