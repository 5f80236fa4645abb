"""How many processors this process may use, which ones, how busy they are, and whether they multiply bfloat16; which devices are there."""

from __future__ import annotations

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

from ramulus.native.memory import groups

STAT, CPUINFO = Path("/proc/stat"), Path("/proc/cpuinfo")
WATCHED = 0.2  # seconds for which the machine is looked at


def allowed() -> set[int]:
    """The numbers of the processors on which this process may run."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cores() -> int:
    """Cores that this process may use: those on which it may run, or fewer where a control group grants less time than that, rounded up."""
    return max(1, min([len(allowed()), *(math.ceil(share) for folder in groups("cpu") if (share := _granted(folder)))]))


def _granted(folder: Path) -> float | None:
    """Processors' worth of time that a control group has, by version 2 or 1; None where it has no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdecimal() and int(quota) > 0 < int(period):
            return int(quota) / int(period)
    return None


def busy_cores() -> float:
    """Of the processors on which this process may run, how many are kept busy now, it asleep meanwhile; 0 where nobody says."""
    try:
        before, began = _worked(), time.monotonic()
        time.sleep(WATCHED)
        return max(0.0, (_worked() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began))
    except (OSError, ValueError, IndexError):
        return 0.0


def _worked() -> float:
    """Ticks that the processors of this process have worked since the machine began: user, nice, system, interrupts, stolen."""
    mine = {f"cpu{number}" for number in allowed()}
    ticks = [list(map(int, line.split()[1:9])) for line in STAT.read_text().splitlines() if line.split(" ", 1)[0] in mine]
    return float(sum(sum(each) - each[3] - each[4] for each in ticks))


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: by AVX512-BF16 or AMX of x86, or by BF16 of ARM.

    Torch's `_is_mkldnn_bf16_supported` asks for AVX-512 alone.
    """
    if CPUINFO.exists():
        features = set(CPUINFO.read_text().split())
    else:
        import torch

        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        features = {name for name, there in capabilities.items() if there is True}
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"})


def device_multiplies_bfloat16(device: Any) -> bool:
    """Whether a torch device multiplies bfloat16 itself: this processor, or a GPU from NVIDIA's Ampere on."""
    if device.type == "cpu":
        return multiplies_bfloat16()
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def planned_in_bfloat16(cuda: bool) -> bool:
    """Whether what takes bfloat16 where it is multiplied would take it, on a GPU or not; a GPU that is not here is taken to multiply it."""
    import torch

    absent = cuda and not torch.cuda.is_available()
    return absent or device_multiplies_bfloat16(torch.device("cuda" if cuda else "cpu"))


def device_of(name: str) -> Any:
    """cpu, cuda, cuda:1, as torch has them; auto takes cuda where there is one. Raises ValueError for a device that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: not a device; use cpu, cuda, cuda:1 or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name}: models run on cpu or cuda here; use one of these, or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch {torch.__version__} sees no CUDA device here; use device=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here, the first is cuda:0")
    return device
