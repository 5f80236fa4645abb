"""Kernels that come with a wheel: each C source for several kinds of processor, made by `setup.py`, chosen when the first one is asked for.

They lie in `lib/` beside a digest of the sources they were made from; where the sources are others, or no kind fits, they are compiled as in a
checkout. RAMULUS_KERNELS=KIND in the environment takes another kind, RAMULUS_KERNELS=compile none.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
LIB = _HERE / "lib"
DIGEST = "sources.sha256"


@dataclass(frozen=True)
class Kind:
    """A kind of processor: what the compiler is told, and what the processor must say that it can."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_MATRIX = ("-mamx-tile", "-mamx-bf16")  # the kernels ask at run time whether there is one
PROCESSORS: dict[str, tuple[Kind, ...]] = {
    "x86_64": (
        Kind("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16", *_MATRIX), _V4 | {"avx512_bf16"}),
        Kind("avx512", ("-march=x86-64-v4",), _V4),
        Kind("avx2", ("-march=x86-64-v3",), _V3),
        Kind("baseline", ("-march=x86-64",)),
    ),
    "aarch64": (Kind("baseline", ("-march=armv8-a",)),),
    "arm64": (Kind("baseline", ("-mcpu=apple-m1",)),),
}
"""By machine, as `platform.machine` calls it, the best first."""

WITH_FLAGS: dict[str, tuple[str, ...]] = {"decode.c": ("-DBFLOAT",), "attention.c": ("-DREAL=double", "-DBFLOAT16")}
"""What callers give the compiler besides, a library each; what is asked for with other flags is compiled at the first use."""


def bundled() -> list[tuple[str, tuple[str, ...]]]:
    """Every source, and the flags that it is compiled with."""
    names = sorted(path.name for path in _HERE.glob("*.c"))
    return [(name, flags) for name in names for flags in ((), *((flag,) for flag in WITH_FLAGS.get(name, ())))]


def digest() -> str:
    """Of all C sources here."""
    texts = [path.read_bytes() for path in sorted([*_HERE.glob("*.c"), *_HERE.glob("*.h")])]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def file_of(source: str, flags: Sequence[str], kind: str) -> str:
    """The name of a library."""
    return "-".join([Path(source).stem, *(flag.removeprefix("-D").replace("=", "_") for flag in flags), kind]) + ".so"


@functools.cache
def abilities() -> frozenset[str]:
    """What the processor says that it can, by Linux's names; nothing where the system does not tell."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        words = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return frozenset(words.lower().replace("avx1.0", "avx").split())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def runnable_kinds() -> list[Kind]:
    """The kinds that this processor can run, the best first; the one that RAMULUS_KERNELS names alone."""
    kinds = PROCESSORS.get(platform.machine(), ())
    named = os.environ.get("RAMULUS_KERNELS", "")
    return [kind for kind in kinds if kind.needs <= abilities() and named in ("", kind.name)]


@functools.cache
def as_the_sources() -> bool:
    """Whether the libraries were made from the sources that are here."""
    try:
        return (LIB / DIGEST).read_text().strip() == digest()
    except OSError:
        return False


def brought_for(source: str, flags: Sequence[str]) -> Path | None:
    """The library of a source for this processor; None where the package brings none."""
    if not as_the_sources():
        return None
    files = [LIB / file_of(source, flags, kind.name) for kind in runnable_kinds()]
    return next((path for path in files if path.is_file()), None)


def make(target: Path, command: Sequence[str]) -> None:
    """Compile every source for every kind of this machine into a folder, with a compiler's command; CalledProcessError where it cannot."""
    target.mkdir(parents=True, exist_ok=True)
    for kind in PROCESSORS.get(platform.machine(), ()):
        for source, flags in bundled():
            out = target / file_of(source, flags, kind.name)
            words = [*command, "-O3", "-shared", "-fPIC", f"-I{_HERE}", *kind.flags, *flags]
            end = ["-o", str(out), str(_HERE / source), "-lm"]
            with_openmp = subprocess.run([*words, "-fopenmp", *end], capture_output=True, check=False)
            if with_openmp.returncode:
                subprocess.run([*words, *end], check=True)
    (target / DIGEST).write_text(digest())
