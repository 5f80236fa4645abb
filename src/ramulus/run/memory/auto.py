"""`tokens_per_batch=auto` and `engine.memory_mb=auto`: what fits into the memory that is free, once, and kept with the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ramulus.core import run_folder
from ramulus.engine.local.compiled import GB
from ramulus.engine.local.factory import Local
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.joining import torchrun_size
from ramulus.models.sizes import Sizes, sizes_of_model
from ramulus.native.memory import free_on
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text, written_json
from ramulus.run.memory.step import USUAL_MB, USUAL_TOKENS, Site, StepMemory, step_memory, wanted_bytes
from ramulus.run.memory.work import work_of

_FILE = "memory.json"  # in the folder of a stage: the numbers that stand in place of auto, also when it goes on where less or more is free
USE = 0.9  # share of what is free that a step is planned for
STEP = 128  # tokens
PRESENT = ("libraries", "weights", "adapters", "float32 masters", "reference model", "the sampler's model")  # when the engine is about to be made
MB = 2**20


@dataclass(frozen=True)
class Taken:
    """Numbers in place of auto, and what is said of them; "" where nothing was auto."""

    tokens_per_batch: int
    memory_mb: int
    said: str = ""

    def save(self, folder: Path) -> None:
        """Keep them with the run."""
        replace_text(folder / _FILE, json.dumps({"tokens_per_batch": self.tokens_per_batch, "memory_mb": self.memory_mb}))

    def lowered(self, folder: Path) -> Callable[[int], None]:
        """What keeps a smaller number of tokens, once an allocation has failed."""
        return lambda tokens: replace(self, tokens_per_batch=tokens).save(folder)


def settled(run: Run, model: Any, device: Any) -> tuple[Run, Taken]:
    """The run with numbers in place of auto: those that it began with, else what fits beside `model` and its learner, on their `device`, now."""
    auto = _is_auto(run)
    longest = run.prompt_limit + run.response_limit
    usual = Taken(max(USUAL_TOKENS, longest), USUAL_MB)
    if not auto:
        return run, usual
    if (run.folder / _FILE).exists():
        kept = written_json(run.folder / _FILE)
        taken = Taken(max(int(kept["tokens_per_batch"]), longest), int(kept["memory_mb"]))
    elif run_folder.steps(run.folder):  # it began before there was an auto
        taken = usual
    else:
        taken = _fitting(run, model, device, auto) or usual
    if "tokens_per_batch" in auto:
        run = replace(run, tokens_per_batch=taken.tokens_per_batch)
    if "memory_mb" in auto:
        assert isinstance(run.engine, Local)
        run = replace(run, engine=replace(run.engine, memory_mb=taken.memory_mb))
    return run, taken


def _is_auto(run: Run) -> set[str]:
    """Which fields are auto."""
    engine = isinstance(run.engine, Local) and run.engine.memory_mb == "auto"
    return ({"tokens_per_batch"} if run.tokens_per_batch == "auto" else set()) | ({"memory_mb"} if engine else set())


def _fitting(run: Run, model: Any, device: Any, auto: set[str]) -> Taken | None:
    """What fits on the device; None for a learner or a model of which nothing is known."""
    if not isinstance(run.learner, Torch | Sharded):
        return None
    try:
        sizes = sizes_of_model(model)
    except ValueError:
        return None
    site = replace(site_of(run, str(device).startswith("cuda")), engine=isinstance(run.engine, Local))
    free = free_for(site, device)
    memory = fitting(run, sizes, site, free)
    said = f"of {free / GB:.1f} GB that are free a step takes at most {missing(memory) / GB:.1f}"
    if "memory_mb" in auto:
        many = f"{memory.rows} sequences of {memory.work.longest:,} tokens together"
        said += f"; keys and values take up to {memory.engine_bytes / GB:.2f} GB, for {many}"
    if "tokens_per_batch" in auto:
        said += f"; up to {memory.asked:,} tokens go through the model at once"
    if missing(memory) > free:
        said += ": it does not fit; see `ramulus plan` for what takes how much"
    return Taken(memory.asked, memory.engine_bytes // MB or USUAL_MB, said)


def site_of(run: Run, cuda: bool | None = None) -> Site:
    """What a run's device is, there or not; auto is a GPU where there is one."""
    if cuda is None:
        cuda = run.device.startswith("cuda") or (run.device == "auto" and torch.cuda.is_available())
    return Site("cuda" if cuda else "cpu", shards=shards_of(run, cuda))


def shards_of(run: Run, cuda: bool) -> int:
    """Ranks of `learner=sharded` that hold one copy of the weights: those of torchrun, as many as it says, or one a GPU; 1 for other learners."""
    if not isinstance(run.learner, Sharded):
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", torchrun_size()))
    usual = here if here > 1 else run.learner.ranks or (max(1, torch.cuda.device_count()) if cuda else 1)
    return run.learner.sharing or usual


def free_for(site: Site, device: Any) -> float:
    """Bytes that one process may take on a device; the ranks of a machine share its memory."""
    return free_on(device) / (site.shards if site.kind == "cpu" else 1)


def fitting(run: Run, sizes: Sizes, site: Site, free: float, present: bool = True) -> StepMemory:
    """The memory of a step whose autos fill what is free: first every path its minimum, then keys and values up to half of what is left, then tokens.

    `present`: the model and its learner are in memory already, so that `free` is beside them. A number that the recipe states stays.
    """
    work = work_of(run)
    least, wanted = rounded_mb(2 * wanted_bytes(run, sizes, work, slots=1)), rounded_mb(wanted_bytes(run, sizes, work))
    says = getattr(run.engine, "memory_mb", USUAL_MB)
    most = max(USUAL_TOKENS, work.longest)

    def planned(tokens: int, room: int) -> StepMemory:
        stated = run.tokens_per_batch
        return step_memory(run, sizes, site, tokens if stated == "auto" else stated, room if says == "auto" else says * MB)

    def left(memory: StepMemory) -> float:
        return free * USE - (missing(memory) if present else memory.peak)

    room = _most(lambda room: left(planned(work.longest, room)), min(least, wanted), wanted, MB, share=0.5)
    tokens = _most(lambda tokens: left(planned(tokens, room)), work.longest, most, STEP)
    room = _most(lambda room: left(planned(tokens, room)), room, wanted, MB)
    return planned(tokens, room)


def missing(memory: StepMemory) -> float:
    """Bytes that a step takes beside what is there when its engine is made."""
    return memory.peak - memory.named(*PRESENT)


def _most(left: Any, least: int, most: int, step: int, share: float = 1.0) -> int:
    """The largest number from `least` to `most`, that leaves 0 bytes; of what `least` leaves it takes the `share`. `least` where none does."""
    spare = (1 - share) * max(0.0, left(least))
    if left(most) >= spare:
        return most
    low, high = 0, max(0, (most - least) // step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left(least + middle * step) >= spare else (low, middle - 1)
    return least + low * step


def rounded_mb(size: int) -> int:
    """Bytes rounded up to whole megabytes."""
    return -(-size // MB) * MB
