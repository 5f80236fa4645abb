"""C sources as libraries, called through ctypes: those that a wheel brings, else compiled by the system's compiler, kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ramulus.native.prebuilt import abilities, brought_for

HERE = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", f"-I{HERE}")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds of the compiler
DAY = 86400.0  # seconds
UNUSED, MOST_KEPT = 30 * DAY, 100  # seconds without use after which a library goes; how many stay of those that nobody used today
_OURS = re.compile(r"[a-z]+-[0-9a-f]{20}\.so")
_SCRATCH = "compiling-"
Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]
"""Of each function, the ctypes of its answer and its arguments."""


class Unavailable(RuntimeError):
    """Why there are no compiled kernels here; decoding then uses torch's operations."""


def library(source: str, signatures: Signatures, *flags: str) -> Any:
    """The library of a C source here; raises Unavailable, with the reason and the remedy, where it cannot be had.

    RAMULUS_NATIVE=0 in the environment asks for torch's operations.
    """
    if os.environ.get("RAMULUS_NATIVE") == "0":
        raise Unavailable("RAMULUS_NATIVE=0 asks for torch's operations")
    loaded = opened(source, *flags)
    if isinstance(loaded, Unavailable):
        raise loaded
    for name, (answer, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = answer, arguments
    return loaded


@functools.cache
def opened(source: str, *flags: str) -> ctypes.CDLL | Unavailable:
    """The library, compiled first where it is not there yet, or why there is none: asked once in a process, so that no run changes its mind."""
    if (brought := brought_for(source, flags)) is not None:
        with suppress(OSError):  # of another C library, say: it is compiled here
            return ctypes.CDLL(str(brought))
    try:
        return _loaded(source, *flags)
    except Unavailable as error:
        return error
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return Unavailable(f"the compiled kernels cannot be loaded or kept: {error}")


def _loaded(source: str, *flags: str) -> ctypes.CDLL:
    """A compiled library, compiled again where another process took it for unused at this very moment."""
    library = built(source, *flags)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        if library.exists():
            raise
        return ctypes.CDLL(str(built(source, *flags)))


def why() -> str:
    """Whether kernels can be compiled here, for a person."""
    try:
        library("decode.c", {})
    except Unavailable as error:
        return f"none: {error}"
    if (brought := brought_for("decode.c", ())) is not None:
        return f"brought by the package, for {brought.stem.rpartition('-')[2]}"
    return f"compiled by {compiler()[0]}"


def has_matrix_unit() -> bool:
    """Whether the kernels multiply bfloat16 by AMX here: processor, system and compiler must all know it."""
    if "amx_bf16" not in abilities():
        return False
    try:
        return bool(library("layers.c", {"ramulus_matrix": (ctypes.c_int64, ())}).ramulus_matrix())
    except Unavailable:
        return False


def multiplying() -> str:
    """By what the kernels multiply bfloat16, for a person, where the processor has a matrix unit; else nothing."""
    if "amx_bf16" not in abilities():
        return ""
    if has_matrix_unit():
        return "; bfloat16 by the matrix unit (AMX)"
    return "; bfloat16 by vectors, which are slower than the matrix unit (AMX) that compiler or system refuse"


def compiler() -> list[str]:
    """The command of the C compiler: $CC, or the first that is there."""
    named = os.environ.get("CC", "").split()
    compilers = [path for name in (named[:1] or COMPILERS) if (path := shutil.which(name))]
    if not compilers:
        wanted = f"CC={named[0]}" if named else " or ".join(COMPILERS)
        raise Unavailable(
            f"no C compiler ({wanted}) was found: install one, say gcc, and decoding and training on a CPU become faster"
        )
    return [compilers[0], *named[1:]]


def built(source: str, *flags: str) -> Path:
    """The library for this source, compiler and processor, made if it is not there yet."""
    command = [*compiler(), *_FLAGS, *flags]
    texts = [path.read_text() for path in (HERE / source, *sorted(HERE.glob("*.h")))]
    name = hashlib.sha256("\0".join((*command, _version(command[0]), processor(), *texts)).encode())
    target = folder() / f"{Path(source).stem}-{name.hexdigest()[:20]}.so"
    if not used(target):
        _build(command, HERE / source, target)
        tidy(target.parent)
    return target


def used(target: Path) -> bool:
    """Whether a library is there; its time of change is then that of its last use, where the cache can be written."""
    try:
        os.utime(target)
    except FileNotFoundError:
        return False
    except OSError:
        return target.exists()
    return True


def tidy(cache: Path, now: float | None = None) -> None:
    """Remove libraries that nobody used for a month, the longest unused beyond MOST_KEPT, and what killed compilers left.

    What was used within a day stays, so that nobody's library goes between being found and being opened; one that is open already outlives
    its file. Several processes may do this at once.
    """
    now = time.time() if now is None else now
    libraries = sorted(((_age(path, now), path) for path in cache.glob("*.so") if _OURS.fullmatch(path.name)), key=lambda each: each[0])
    for place, (age, path) in enumerate(libraries):
        if age > UNUSED or (place >= MOST_KEPT and age > DAY):
            with suppress(OSError):
                path.unlink()
    for path in cache.glob(f"{_SCRATCH}*"):
        if _age(path, now) > DAY:
            shutil.rmtree(path, ignore_errors=True)


def _age(path: Path, now: float) -> float:
    """Seconds since a file was used; 0 where it is gone."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0


def _build(command: list[str], source: Path, target: Path) -> None:
    """Compile into place at once, so that other processes see a whole file or none; without OpenMP where the compiler has none."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
        out = Path(scratch) / target.name
        reason = ""
        for extra in (("-fopenmp",), ()):
            output = _run([*command, *extra, "-o", str(out), str(source), "-lm"])
            if output.returncode == 0 and out.exists():
                out.replace(target)
                return
            reason = reason or output.stderr.strip() or f"exit status {output.returncode}"
    raise Unavailable(f"{command[0]} could not compile the kernels: {reason[:500]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler; Unavailable where it cannot be run or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error


def _version(command: str) -> str:
    """The first line in which a compiler says what it is."""
    return _run([command, "--version"]).stdout.partition("\n")[0]


def processor() -> str:
    """The model and the features of this processor, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
    described = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(described))) or platform.machine()


def folder() -> Path:
    """Where compiled kernels are kept: $RAMULUS_CACHE, else the user's cache."""
    named = os.environ.get("RAMULUS_CACHE")
    if named:
        return Path(named).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramulus"
