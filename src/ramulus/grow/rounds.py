"""Growing a forest round by round, all trees together: for rules that ask for something between rounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ramulus.core.tree import Tree
from ramulus.engine.engine import Engine, Sampling, together
from ramulus.grow.branching import Branching
from ramulus.grow.growth import OnTree, close, grow_round
from ramulus.grow.pruning import Pruning
from ramulus.grow.stop import Stop

Between = Callable[[list[Tree]], Awaitable[None]]
"""Called after every round of a forest with the trees that grew in it, in the order they were given."""


async def grow_rounds(
    trees: Sequence[Tree],
    engine: Engine,
    branching: Branching,
    sampling: Sampling,
    stop: Stop,
    pruning: Sequence[Pruning] = (),
    between: Between | None = None,
    on_tree: OnTree | None = None,
) -> list[Tree]:
    """Grow trees, all of them waiting for the last one after each round; `on_tree` is awaited for each once all are done.

    What `between` sees depends on no clock: whole rounds, in the order of `trees`.
    """
    living = list(trees)
    while living:
        grew = await together(grow_round(tree, engine, branching, sampling, stop, pruning) for tree in living)
        living = [tree for tree, more in zip(living, grew, strict=True) if more]
        if living and between is not None:
            await between(living)
    await together(close(tree, on_tree) for tree in trees)
    return list(trees)
