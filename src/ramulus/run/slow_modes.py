"""What makes a run slower than this machine could be: said once, before its first step, with the remedy."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ramulus.core import run_folder
from ramulus.native.build import why
from ramulus.run.config.recipe import Run
from ramulus.run.doctor import cores

WATCHED = 0.2  # seconds for which the machine is looked at
STAT = Path("/proc/stat")


def threads_of(run: Run) -> int:
    """Threads for a run: its own, those of its newest checkpoint (the last bits depend on them), else the usual ones."""
    return run.threads or recorded_threads(run.folder) or usual_threads()


def recorded_threads(folder: Path) -> int | None:
    """Threads of the newest checkpoint of a run, where it says them and the machine has as many cores."""
    before = run_folder.stage_folders(folder.parent) if (folder.parent / "run.json").is_file() else []
    for stage in (folder, *reversed(before)):  # a run of several stages keeps them from stage to stage
        with suppress(OSError, ValueError, KeyError, TypeError):
            count = int((run_folder.newest_state(stage) or {})["numerics"]["threads"])
            return count if 1 <= count <= cores() else None
    return None


@cache
def usual_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the cores that others leave free, at least one."""
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    return max(1, cores() - round(busy_cores())) if cores() > 1 else 1


def busy_cores() -> float:
    """Cores that are kept busy now, this process asleep meanwhile; 0 where nobody says."""
    try:
        before, began = _worked(), time.monotonic()
        time.sleep(WATCHED)
        return max(0.0, (_worked() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began))
    except (OSError, ValueError, IndexError):
        return 0.0


def _worked() -> float:
    """Ticks that all cores have worked since the machine began: user, nice, system, interrupts, stolen."""
    ticks = list(map(int, STAT.read_text().splitlines()[0].split()[1:9]))
    return float(sum(ticks) - ticks[3] - ticks[4])


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_modes(run: Run, device: torch.device) -> list[str]:
    """A sentence for each mode of this run that makes it slower than it could be here; none on a GPU."""
    if device.type != "cpu":
        return []
    sentences, threads, most = [], torch.get_num_threads(), cores()
    if (kernels := why()).startswith("none: "):
        sentences.append(f"slow: torch's operations in place of compiled kernels, as {kernels.removeprefix('none: ')}")
    if threads < most and run.threads is None:
        reason = "as OMP_NUM_THREADS says" if os.environ.get("OMP_NUM_THREADS") else "as others keep this machine busy, or its checkpoints began so"
        sentences.append(f"{threads} of {most} threads, {reason}; threads={most} takes all")
    elif threads == 1 < most:
        sentences.append(f"1 thread of {most}, as threads=1 says")
    if run.autocast and not multiplies_bfloat16():
        sentences.append("slow: autocast=true on a processor that does not multiply bfloat16; autocast=false is faster here")
    return sentences
