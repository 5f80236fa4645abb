"""`tokens_per_batch=auto` and `engine.memory_mb=auto`: what fits into the memory that is free, once, and kept with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ramulus.core import run_folder
from ramulus.engine.factory import engine_traits
from ramulus.engine.memory import USUAL_MB
from ramulus.learn.factory import learner_traits
from ramulus.learn.policy.kept import kept_by_layer
from ramulus.learn.policy.learner import Learner
from ramulus.models.sizes import Sizes, sizes_of_model
from ramulus.native.memory import GB
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text, written_json
from ramulus.run.event_loop import run_to_end
from ramulus.run.memory.rooms import Room, rooms_here
from ramulus.run.memory.step import USUAL_TOKENS, Site, StepMemory, sampling_of, step_memory
from ramulus.run.memory.work import work_of

_FILE = "memory.json"  # in the folder of a stage: the numbers that stand in place of auto, also when it goes on where less or more is free
USE = 0.9  # share of what is free that a step is planned for
STEP = 128  # tokens
MB = 2**20
Rooms = Callable[[Run, Any], Sequence[Room]]
"""Of a run that learns on a device."""


@dataclass(frozen=True)
class Taken:
    """Numbers in place of auto, and what is said of them; "" where nothing was auto."""

    tokens_per_batch: int
    memory_mb: int
    remark: str = ""

    def save(self, folder: Path) -> None:
        """Keep them with the run."""
        replace_text(folder / _FILE, json.dumps({"tokens_per_batch": self.tokens_per_batch, "memory_mb": self.memory_mb}))


def settled(run: Run, model: Any, device: Any, rooms: Rooms = rooms_here, learner: Learner | None = None) -> tuple[Run, Taken]:
    """The run with numbers in place of auto: those that it began with, else what fits beside `model` and its learner, on their `device`, now.

    `rooms`: what its processes share, and what is free there. What a token's forward pass keeps is asked of the `learner` that is given,
    if it measures that.
    """
    auto = _is_auto(run)
    longest = run.prompt_limit + run.response_limit
    usual = Taken(max(USUAL_TOKENS, longest), USUAL_MB)
    if not auto:
        return run, usual
    if (run.folder / _FILE).exists():
        kept = written_json(run.folder / _FILE)
        taken = Taken(max(int(kept["tokens_per_batch"]), longest), int(kept["memory_mb"]))
    else:
        taken = _fitting(run, model, rooms(run, device), auto, learner) or usual
        if run_folder.steps(run.folder) and taken.tokens_per_batch >= usual.tokens_per_batch and taken.memory_mb >= usual.memory_mb:
            taken = usual  # it began before there was an auto, and goes on as it was where that fits
    if "tokens_per_batch" in auto:
        run = replace(run, tokens_per_batch=taken.tokens_per_batch)
    if "memory_mb" in auto:
        engine: Any = run.engine
        run = replace(run, engine=replace(engine, memory_mb=taken.memory_mb))
    return run, taken


def _is_auto(run: Run) -> set[str]:
    """The fields that say "auto": tokens_per_batch, memory_mb, both or none."""
    engine = engine_traits(run.engine).memory.memory_mb == "auto"
    return ({"tokens_per_batch"} if run.tokens_per_batch == "auto" else set()) | ({"memory_mb"} if engine else set())


def _fitting(run: Run, model: Any, rooms: Sequence[Room], auto: set[str], learner: Learner | None) -> Taken | None:
    """What fits; None for a learner or a model of which nothing is known."""
    if learner_traits(run.learner).memory is None:
        return None
    try:
        sizes = sizes_of_model(model)
    except ValueError:
        return None
    if "tokens_per_batch" in auto and learner is not None:
        sizes = replace(sizes, kept=run_to_end(kept_by_layer(learner, sizes)))
    tokens, engine_bytes = fitted(run, sizes, rooms)
    needed = {room: room.needed(run, sizes, tokens, engine_bytes) for room in rooms}
    fullest = max(rooms, key=lambda room: needed[room] / max(1.0, room.free))
    remark = f"of {fullest.free / GB:.1f} GB that are free{fullest.spelled} a step takes at most {needed[fullest] / GB:.1f}"
    if "memory_mb" in auto:
        samplers = sum(site.engine for room in rooms for site in (*room.here, *room.to_start))
        rows = engine_traits(run.engine).memory.rows(sampling_of(run, sizes, sampling_site(rooms)), engine_bytes)
        many = f"{rows} sequences of {work_of(run).longest:,} tokens together"
        remark += f"; keys and values take up to {engine_bytes / GB:.2f} GB{' in each sampler' if samplers > 1 else ''}, for {many}"
    if "tokens_per_batch" in auto:
        remark += f"; up to {tokens:,} tokens go through the model at once"
    if needed[fullest] > fullest.free:
        remark += ": it does not fit; see `ramulus plan` for what takes how much"
    return Taken(tokens, engine_bytes // MB or USUAL_MB, "; ".join([remark, *work_of(run).assumed]))


def fitting(run: Run, sizes: Sizes, site: Site, free: float, present: bool = True) -> StepMemory:
    """The memory of a step in one process that has room for itself, whose autos fill what is free there.

    `present`: the model and its learner are in memory already, so that `free` is beside them.
    """
    return step_memory(run, sizes, site, *fitted(run, sizes, [Room(free, (site,)) if present else Room(free, (), (site,))]))


def fitted(run: Run, sizes: Sizes, rooms: Sequence[Room]) -> tuple[int, int]:
    """Tokens of a batch, and bytes of keys and values in each process that samples, with which all rooms hold their processes.

    First every path its minimum, then keys and values up to half of what is left, then tokens. A number that the recipe states stays.
    """
    work, stated, engine = work_of(run), run.tokens_per_batch, engine_traits(run.engine).memory
    sampling = sampling_of(run, sizes, sampling_site(rooms))
    least, wanted = rounded_mb(2 * engine.wanted(sampling, 1)), rounded_mb(engine.wanted(sampling))
    most = max(USUAL_TOKENS, work.longest)

    def numbers(tokens: int, room: int) -> tuple[int, int]:
        return (tokens if stated == "auto" else max(stated, work.longest)), (room if engine.memory_mb == "auto" else engine.memory_mb * MB)

    def left(tokens: int, room: int) -> float:
        return min(each.free * USE - each.needed(run, sizes, *numbers(tokens, room)) for each in rooms)

    room = _most(lambda room: left(work.longest, room), min(least, wanted), wanted, MB, share=0.5)
    tokens = _most(lambda tokens: left(tokens, room), work.longest, most, STEP)
    room = _most(lambda room: left(tokens, room), room, wanted, MB)
    return numbers(tokens, room)


def sampling_site(rooms: Sequence[Room]) -> Site:
    """A process that samples, of those in the rooms."""
    return next((site for room in rooms for site in (*room.here, *room.to_start) if site.engine), Site())


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
