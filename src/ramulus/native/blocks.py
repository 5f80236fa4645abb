"""Large blocks of torch's tensors on a CPU: what is freed is kept for the next one, where a C++ compiler is."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ramulus.native.build import Unavailable, library

KEEP = "RAMULUS_KEEP_BLOCKS"  # of the environment: 0 leaves blocks to torch and the C library
_SIGNATURES = {"ramulus_keep": (None, (ctypes.c_int, ctypes.c_int)), "ramulus_idle": (ctypes.c_int64, ()), "ramulus_drop": (None, ())}
_kept: Any = None
_keepers = 0


def keep_blocks(large_pages: bool) -> bool:
    """From now on keep blocks of 1 MB or more that tensors leave, up to what was in use at once, until `leave_blocks`; whether that can be done.

    Else the system fills every block of 32 MB or more with zeros before it is used, and smaller ones over and over: a fifth of an update.
    Warns where they could be kept, had the machine a C++ compiler.
    """
    global _kept, _keepers
    if _kept is None:
        if _refused():
            return False
        try:
            _kept = _library()
        except Unavailable as error:
            warnings.warn(f"updates take up to a quarter longer, since memory that tensors leave is not kept: {error}", RuntimeWarning, stacklevel=2)
            return False
    _keepers += 1
    _kept.ramulus_keep(True, large_pages)
    return True


def leave_blocks() -> None:
    """One of those who keep blocks has ended; with the last one torch allocates as it did, and what waits is given back."""
    global _keepers
    _keepers -= 1
    if not _keepers:
        _kept.ramulus_keep(False, False)


def blocks_refused() -> str:
    """Why blocks cannot be kept here, or ""."""
    if reason := _refused():
        return reason
    try:
        _library()
    except Unavailable as error:
        return f"no, and updates take up to a quarter longer: {error}"
    return ""


def _refused() -> str:
    """Why blocks are not to be kept, where somebody says so or the system is another."""
    if asked := [name for name in (KEEP, "RAMULUS_NATIVE") if os.environ.get(name) == "0"]:
        return f"{asked[0]}=0 leaves them to torch"
    return "" if sys.platform == "linux" else "left to torch: only on Linux is it known to be slower"


def _library() -> Any:
    return library("blocks.cpp", _SIGNATURES, *_flags())


def _flags() -> tuple[str, ...]:
    """What the compiler is told so that the library is one for this torch."""
    import torch

    home = Path(torch.__file__).parent
    built = (f"-DTORCH={torch.__version__}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    return ("-std=c++20", *built, f"-I{home / 'include'}", f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-lstdc++")


def idle_bytes() -> int:
    """Bytes that are kept and wait."""
    return 0 if _kept is None else int(_kept.ramulus_idle())


def drop_blocks() -> None:
    """Give back to the system what waits."""
    if _kept is not None:
        _kept.ramulus_drop()
