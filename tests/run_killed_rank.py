"""Train as one of torchrun's ranks that kills itself, as SIGKILL does, at a chosen moment: `run_killed_rank.py RANK MOMENT NUMBER WORD ...`.

Only in the first life of the group; the shipped code runs unchanged up to the moment.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from typing import Any

from ramulus.cli import main
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded import calls, sharded_learner
from ramulus.learn.sharded.sharded_policy import ShardedPolicy
from ramulus.learn.sharded.world import World
from ramulus.run import checkpoint

MOMENTS = {  # name -> (owner, attribute)
    "growing": (LocalEngine, "sample"),  # rank 0
    "waiting": (World, "hear"),  # the others
    "scoring": (TorchPolicy, "score"),
    "learning": (ShardedPolicy, "accumulate"),
    "stepping": (ShardedPolicy, "update"),
    "gathering": (ShardedPolicy, "whole"),
    "writing the model": (sharded_learner, "write_whole"),  # rank 0
    "writing shards": (calls, "write_shards"),
    "renaming": (checkpoint, "put"),  # rank 0
}


def arm(moment: str, number: int) -> None:
    """Let the call with this number, from 1, be the last one."""
    owner, name = MOMENTS[moment]
    real, seen = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(170, exit=True)  # a life takes some 15 s: who waits for ever says where
    rank, moment, number, *words = sys.argv[1:]
    if rank == os.environ["RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm(moment, int(number))
    main(["train", *words])
