"""How many bytes does a forest take? `python -m benchmarks.memory`.

64 trees of 8 paths of 1,000 tokens, every column recorded and one signal scored, each number an object of its own as an engine gives it. The
figure is what tracemalloc counts once the forest stands.
"""

from __future__ import annotations

import gc
import random
import tracemalloc

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree

TREES, PATHS, TOKENS = 64, 8, 1000


def tree(index: int) -> Tree:
    """One tree with everything that a sampler and a learner leave behind."""
    chance = random.Random(index)
    made = Tree.plant(Task(f"t{index}", (1, 2, 3), "1 + 2"), seed=index)
    for _ in range(PATHS):
        columns = {name: [chance.expovariate(1) for _ in range(TOKENS)] for name in ("logprobs", "kept", "entropy", "temperature")}
        signals = {"recomputed": [chance.expovariate(1) for _ in range(TOKENS)]}
        made.add(made.root, [chance.randrange(150_000) for _ in range(TOKENS)], Author.POLICY, finish="eos", reward=1.0, signals=signals, **columns)
    return made


def main() -> None:
    """Measure and print."""
    gc.collect()
    tracemalloc.start()
    forest = [tree(index) for index in range(TREES)]
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    print(f"{len(forest)} trees x {PATHS} paths x {TOKENS} tokens: {held / 2**20:.1f} MiB, {held / (TREES * PATHS * TOKENS):.1f} bytes a token")


if __name__ == "__main__":
    main()
