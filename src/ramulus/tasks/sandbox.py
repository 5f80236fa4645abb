"""What a worker process may do: limits that it sets itself before it takes a call, and what its parent gives it. Standard library only.

Everywhere: an empty folder of its own as working folder, home and temporary folder, a short environment, limits on computing time, open
files and the size of files. On Linux also a limit on memory, no core dumps, no new privileges, death with the parent; and, where the system
allows user namespaces, no network, no shared memory of others, and a limit on the number of processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PASSED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "PYTHONHASHSEED",
    "PYTHONHOME",
    "VIRTUAL_ENV",
)
WORKER_MARK = "RAMULUS_WORKER"  # names the worker in the environment of whatever it starts
OPEN_FILES, FILE_BYTES, PROCESSES = 256, 2**28, 64
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000


def environment(folder: str, mark: str, names: tuple[str, ...] = ()) -> dict[str, str]:
    """What a worker sees of this process's environment: PASSED and `names`, with its own folder as home."""
    given = {name: os.environ[name] for name in (*PASSED, *names) if name in os.environ}
    own = {"HOME": folder, "TMPDIR": folder, WORKER_MARK: mark, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return given | own


def confine(parent: int, gigabytes: float | None, network: bool) -> None:
    """Limit this process for good. `parent` is the process that started it: it ends with that one."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if not network:
            _leave_network(libc)
        for option, value in (
            (38, 1),
            (4, 1),
        ):  # PR_SET_NO_NEW_PRIVS; PR_SET_DUMPABLE, or /proc would hide what it starts
            libc.prctl(option, value, 0, 0, 0)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; elsewhere the alarm and the closed pipe do it
        if os.getppid() != parent:  # it died before we asked
            sys.exit(1)
    try:
        import resource
    except ImportError:  # Windows
        return
    _limit(resource, resource.RLIMIT_CORE, 0)
    _limit(resource, resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource, resource.RLIMIT_FSIZE, FILE_BYTES)
    if gigabytes is not None and sys.platform == "linux":  # macOS refuses this limit
        _limit(resource, resource.RLIMIT_AS, int(gigabytes * 2**30))
    if own_namespace():  # elsewhere it counts all processes of the user
        _limit(resource, resource.RLIMIT_NPROC, PROCESSES)


def _limit(resource: Any, kind: int, value: int) -> None:
    """Lower a limit, hard and soft; a lower one that is there already stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def _leave_network(libc: Any) -> None:
    """A user namespace with a network that leads nowhere, the user's id as it was; nothing changes where the system refuses that."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC) != 0:
        return
    with suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def own_namespace() -> bool:
    """Whether this process is in a user namespace in which only one user is mapped."""
    try:
        return Path("/proc/self/uid_map").read_text().split()[2:] == ["1"]
    except (OSError, IndexError):
        return False


def state() -> dict[str, Any]:
    """What is in force in this process, as plain JSON: for `ramulus doctor`, which asks a worker."""
    facts: dict[str, Any] = {
        "namespace": own_namespace(),
        "names": sorted(os.environ),
        "folder": os.getcwd() == os.environ.get("HOME"),
    }
    with suppress(OSError):
        lines = Path("/proc/net/dev").read_text().splitlines()[2:]
        facts["network"] = any(line.split(":")[0].strip() != "lo" for line in lines)
    with suppress(ImportError):
        import resource

        limits = {
            "memory": resource.RLIMIT_AS,
            "open files": resource.RLIMIT_NOFILE,
            "file bytes": resource.RLIMIT_FSIZE,
        }
        for name, kind in limits.items():
            soft = resource.getrlimit(kind)[0]
            facts[name] = None if soft == resource.RLIM_INFINITY else soft
    return facts


def in_words(facts: dict[str, Any]) -> str:
    """A state in one line."""
    memory = facts.get("memory")
    parts = [
        f"memory up to {memory / 2**30:.0f} GiB" if memory else "no limit on memory",
        f"{facts.get('open files')} open files",
        "an empty folder" if facts["folder"] else "the working folder of this process",
        f"{len(facts['names'])} environment variables",
        "no network"
        if facts["namespace"] and not facts.get("network", True)
        else "the network is open: this system gives no user namespaces",
    ]
    return ", ".join(parts)


def kill_marked(mark: str) -> None:
    """Kill every process that was started under this mark, whatever session it is in. Linux; elsewhere the process group is all that is known."""
    needle = f"{WORKER_MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with suppress(OSError):
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
