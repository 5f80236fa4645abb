"""How much memory this process may still take, whether an allocation failed, and giving back what is not used."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where a container's limit and what it uses stand, by version 2 and 1 of cgroups."""
CACHED = ("inactive_file", "active_file")  # of a container's memory.stat: given back when somebody needs it


def free_memory() -> int:
    """Bytes that can be taken now without swapping: what the system calls available, less where a container's limit leaves less.

    Where the system does not say, half of the machine's memory; where it does not say that either, 2 GiB.
    """
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*(available or [machine_memory() // 2]), *_container()])


def free_on(device: object) -> int:
    """Bytes that this process may still take on a device of torch: on a GPU what is free and what its own allocator holds unused."""
    if not str(device).startswith("cuda"):
        return free_memory()
    import torch

    unused = torch.cuda.memory_reserved(str(device)) - torch.cuda.memory_allocated(str(device))
    return int(torch.cuda.mem_get_info(str(device))[0]) + unused


def machine_memory() -> int:
    """Bytes of memory that this machine has; where the system does not say, 4 GiB."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**32


def _container() -> list[int]:
    """What the limit of a container leaves; [] without one."""
    for folder, limit, usage in LIMITS:
        here = CGROUP / folder
        try:
            most, used, stat = ((here / name).read_text() for name in (limit, usage, "memory.stat"))
        except OSError:
            continue
        if most.strip() == "max":
            return []
        parts = dict(line.split()[:2] for line in stat.splitlines())
        cached = sum(int(parts.get(name, 0)) for name in CACHED)
        return [max(0, int(most) - max(0, int(used) - cached))]
    return []


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
def _trim() -> Callable[[int], int] | None:
    """malloc_trim of the C library; None where it has none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Return to the system what has been freed: the C library keeps smaller blocks, and fragments them, where large ones are given back at once."""
    if (trim := _trim()) is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
