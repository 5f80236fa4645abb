"""A command that torchrun has started many times: rank 0 runs it, the others serve its learner. Torch is loaded where there are others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def torchrun_size() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1


@contextmanager
def in_torchrun(seconds: float = 1800.0) -> Iterator[bool]:
    """Inside, whether this process is to run the command: rank 0 of torchrun's processes, or the only one. Another rank has served it by then."""
    size = torchrun_size()
    if size == 1:
        yield True
        return
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from ramulus.learn.sharded.starting import serve_rank
    from ramulus.learn.sharded.world import STANDING, meet

    store, rank, _ = next(rendezvous("env://"))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # where torchrun keeps its store, it holds the addresses of ranks that are gone
    world = meet(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), seconds, store=PrefixStore(f"life-{life}", store))
    try:
        if world.rank > 0:
            serve_rank(world)
            yield False
            return
        STANDING.append(world)
        yield True
    finally:
        STANDING.clear()
        if world.rank == 0 and not world.broken:
            world.tell("end", [None] * size)
        world.leave()
