"""One writer a folder: a lock that names its process and host, and is free again when that process has ended, however it ended."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ramulus.core.json_object import object_in

try:
    import fcntl
except ImportError:  # Windows locks no folder
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
BEAT = 5.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one after which a process on another host counts as gone


def in_the_way(folder: Path, error: OSError) -> str:
    """Why a folder cannot be written in, up to the word before what else to do."""
    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        return f"{file} is a file; "
    return f"{error.strerror or error}; {'free space, or ' if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}"


class Lock:
    """Folders that nobody else writes until `release`; they are made where they are missing.

    The system frees the lock of a process that has ended. A file system may keep locks of different hosts apart: a lock that another host
    left is taken over once it gives no sign of life. Raises ValueError, naming process, host and remedy, for a folder that is taken.
    """

    def __init__(self, folders: Iterable[Path], remedy: str = "choose another with out=FOLDER") -> None:
        self.files: dict[Path, int] = {}
        self.new_folders: list[Path] = []  # folders that were not there
        self.ended = threading.Event()
        try:
            for folder in dict.fromkeys(folder.resolve() for folder in folders):
                self.new_folders += [] if folder.exists() else [folder]
                folder.mkdir(parents=True, exist_ok=True)
                self.files[folder / LOCK_FILE] = taken(folder / LOCK_FILE, remedy)
        except OSError as error:
            self.release()
            raise OSError(f"cannot write in the folder {folder}: {in_the_way(folder, error)}{remedy}") from error
        except BaseException:
            self.release()
            raise
        self.thread = threading.Thread(target=beat, args=(weakref.ref(self), self.ended), name="lock", daemon=True)
        self.thread.start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def fileno(self) -> int:
        """The first lock, for processes that inherit it."""
        return next(iter(self.files.values()))

    def beat(self) -> None:
        """Give a sign of life."""
        for handle in list(self.files.values()):
            with suppress(OSError):
                os.utime(handle)

    def release(self, moved: tuple[Path, Path] | None = None) -> None:
        """Free the folders; `moved` is a folder above them that was renamed meanwhile, from and to, without links."""
        self.ended.set()
        for path, handle in self.files.items():
            if moved is not None and path.is_relative_to(moved[0]):
                path = moved[1] / path.relative_to(moved[0])
            with suppress(OSError):
                if current(path, handle):
                    path.unlink()  # still locked: whoever opened it meanwhile sees that it is no longer the one
            os.close(handle)
        for folder in reversed(self.new_folders):
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
        self.files, self.new_folders = {}, []


def beat(reference: weakref.ref[Lock], ended: threading.Event) -> None:
    """Signs of life for as long as there is a lock."""
    while not ended.wait(BEAT):
        if (lock := reference()) is None:
            return
        lock.beat()
        del lock


def taken(path: Path, remedy: str) -> int:
    """The handle of a lock file that is now ours, with our name in it. ValueError where it is another's."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            wait_for_host(path, object_in(path), held(handle, path, remedy), remedy)
        except BaseException:
            os.close(handle)
            raise
        if current(path, handle):
            break
        os.close(handle)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
    return handle


def held(handle: int, path: Path, remedy: str) -> bool:
    """Lock a file; whether the file system can. ValueError where another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        raise busy(path, object_in(path), remedy) from error
    except OSError:  # a file system without locks: signs of life alone
        return False


def check_free(folder: Path, own: Lock, deep: int = 3) -> None:
    """ValueError where another process is at work somewhere in a folder."""
    for level in range(deep):
        for path in folder.resolve().glob("*/" * level + LOCK_FILE):
            if path.resolve() not in own.files:
                Lock([path.parent]).release()


def current(path: Path, handle: int) -> bool:
    """Whether an open file is the one that stands at the path now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def wait_for_host(path: Path, owner: dict[str, Any], locks: bool, remedy: str) -> None:
    """Where another host left the lock, or the file system has none: see whether it still gives signs of life. ValueError if so."""
    if not owner or (locks and owner.get("host") == socket.gethostname()) or time.time() - path.stat().st_mtime > 20 * SILENT:
        return
    warnings.warn(f"{process_of(owner)} has left {path} locked: seeing for {SILENT:.0f} seconds whether it is still at work", stacklevel=2)
    last, until = path.stat().st_mtime, time.monotonic() + SILENT
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        with open(path, "rb") as file:  # opened anew: a network file system then asks its server
            if os.fstat(file.fileno()).st_mtime != last:
                raise busy(path, object_in(path), remedy)


def process_of(owner: dict[str, Any]) -> str:
    """The process that a lock names."""
    return f"process {owner.get('process', '?')} on {owner.get('host', '?')}"


def busy(path: Path, owner: dict[str, Any], remedy: str) -> ValueError:
    """Who is at work in a folder, and what can be done."""
    number, here = owner.get("process"), owner.get("host") == socket.gethostname()
    gone = here and isinstance(number, int) and not alive(number)
    who = f"what {process_of(owner)} began before it ended" if gone else process_of(owner)
    since = f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner['since']))}" if isinstance(owner.get("since"), int | float) else ""
    return ValueError(f"{who} is still at work in {path.parent}{since}: wait for it, stop it, or {remedy}")


def alive(process: int) -> bool:
    """Whether there is a process with this number here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted by its run while it is read."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None and folder.is_dir() else None
    try:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def being_read(folder: Path) -> bool:
    """Whether some process reads a checkpoint just now."""
    if fcntl is None:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
