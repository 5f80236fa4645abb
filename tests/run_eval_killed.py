"""Evaluate in a process of its own that kills itself, as SIGKILL does: `python run_eval_killed.py MOMENT NUMBER MODEL --tasks ...`.

The shipped code runs unchanged up to the call with this number; only then does this file step in.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from ramulus.cli import main
from ramulus.core import store
from ramulus.engine.local.local_engine import LocalEngine


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_tree(path: Path, trees: Any, append: bool = False) -> None:
    """One whole tree, then half of another one."""
    first, second = (store.dump(tree) for tree in list(trees)[:2])
    with open(path, "ab") as file:
        file.write(first + second[: len(second) // 2])
        file.flush()
    die()


MOMENTS = {  # name -> (owner, attribute, what stands in at the moment)
    "sampling": (LocalEngine, "sample", die),
    "between_files": (store, "write", die),
    "half_a_tree": (store, "write", half_a_tree),
}

if __name__ == "__main__":
    moment, number, *words = sys.argv[1:]
    owner, name, end = MOMENTS[moment]
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        return (end if calls == int(number) else real)(*args, **kwargs)

    setattr(owner, name, counted)
    main(["eval", *words])
