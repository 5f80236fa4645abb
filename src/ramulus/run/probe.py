"""What a machine of a cluster says of itself, and what it reaches. It knows nothing of Ray: an object that somebody places on each machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ramulus.native.build import processor
from ramulus.native.memory import free_memory
from ramulus.native.processors import cores
from ramulus.run.doctor import version_of
from ramulus.run.sampler import versions

KNOCKING = 5.0  # seconds in which a port must answer
_HELLO = b"ramulus"
_ASKED = "--query-gpu=name,memory.total,driver_version"


@dataclass(frozen=True)
class NodeReport:
    """A machine as a process on it sees it; bytes, and names of GPUs with their MiB and driver."""

    host: str
    versions: dict[str, str]  # of Python and what must be alike; "" where it is not installed
    sources: str  # of the ramulus that is imported, a checksum
    processor: str  # as the kernels' compiler sees it, in lines
    cores: int
    memory: int  # that is free
    disk: int  # free, where temporary files go
    files: int  # that a process may have open; 0 where the system has no such limit
    gpus: tuple[str, ...]
    cuda: str  # that torch is built for; "" for a CPU build


class Probe:
    """Looks at its machine; one is placed on each."""

    def look(self) -> NodeReport:
        """The machine as it is."""
        import torch

        found_versions = versions() | {"ray": version_of("ray") or ""}
        disk = shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free
        readings = (socket.gethostname(), found_versions, sources(), processor(), cores(), free_memory(), disk, open_files())
        return NodeReport(*readings, gpus(), torch.version.cuda or "")

    def clock(self) -> float:
        """Seconds since 1970, by this machine."""
        return time.time()

    def read(self, file: str) -> str:
        """The text of a file, or why it cannot be read, after a '!'."""
        try:
            return Path(file).read_text()
        except OSError as error:
            return f"!{error.strerror or error}"

    def write(self, file: str, text: str) -> str:
        """Write a file; why it cannot be, or nothing."""
        try:
            Path(file).write_text(text)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        Path(file).unlink(missing_ok=True)

    def listen(self, address: str) -> int:
        """The number of a free port at which this answers from now on."""
        door = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=_answer, args=(door,), daemon=True).start()
        return int(door.getsockname()[1])

    def knock(self, doors: Sequence[tuple[str, int]]) -> list[str]:
        """Why nobody answers at each address and port; nothing where somebody does."""
        return [_why_closed(door) for door in doors]


def _answer(door: socket.socket) -> None:
    """Say hello to whoever comes."""
    while True:
        visitor, _ = door.accept()
        with visitor, suppress(OSError):
            visitor.sendall(_HELLO)


def _why_closed(door: tuple[str, int]) -> str:
    """Why nothing answers; nothing where the Probe that listens there does."""
    try:
        with socket.create_connection(door, KNOCKING) as visit:
            visit.settimeout(KNOCKING)
            hello = visit.recv(len(_HELLO))
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return "" if hello == _HELLO else "somebody else answers"


def sources() -> str:
    """A checksum of the Python sources of the ramulus that is imported."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def open_files() -> int:
    """Files that this process may have open; 0 where the system has no such limit."""
    try:
        import resource
    except ImportError:
        return 0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def gpus() -> tuple[str, ...]:
    """The GPUs that NVIDIA's own tool names, also those that this process is not given; () without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        output = subprocess.run([tool, _ASKED, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    parts = [[part.strip() for part in line.split(",")] for line in output.splitlines() if line.count(",") == 2]
    return tuple(f"{name}, {int(memory) / 1024:.0f} GiB, driver {driver}" for name, memory, driver in parts)
