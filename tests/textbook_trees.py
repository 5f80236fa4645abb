"""TreeRL's and AttnRL's advantages from the rows alone, as the papers and the released code write them. Imports nothing from ramulus.

`paths[i]`: names of the nodes that row i goes through, first the question or the part of a demonstration that it goes on from.
`owner[i][t]`: the node that wrote its token t.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor


def node_advantages(
    reward: Tensor, paths: list[list], owner: list[list], columns: int, trained: list[bool], form: str
) -> Tensor:
    """[B, L]: every token's advantage in its row, by looking at all rows that share each node."""
    answer = torch.zeros(len(paths), columns, dtype=torch.float64)
    for i, path in enumerate(paths):
        value = released(reward, paths, path, trained) if form == "released" else global_local(reward, paths, path)
        for t, node in enumerate(owner[i]):
            answer[i, t] = value.get(node, 0.0)
    return answer


def sharing(paths: list[list], node) -> list[int]:
    """The rows that go through a node."""
    return [k for k, path in enumerate(paths) if node in path]


def global_local(reward: Tensor, paths: list[list], path: list) -> dict:
    """(V - V(root) + V - V(parent)) / sqrt(leaves) of each node of a path (arXiv 2506.11902, section 3.2)."""
    value = [float(reward[sharing(paths, node)].mean()) for node in path]
    return {
        path[d]: (value[d] - value[0] + value[d] - value[d - 1]) / math.sqrt(len(sharing(paths, path[d])))
        for d in range(1, len(path))
    }


def released(reward: Tensor, paths: list[list], path: list, trained: list[bool]) -> dict:
    """Sum of leave-one-out rewards over sqrt(trained leaves) and leaves; plus its difference to the parent, or the parent's own."""
    group = sharing(paths, path[0])
    apart = {k: float(reward[k] - reward[[j for j in group if j != k]].mean()) if len(group) > 1 else 0.0 for k in group}
    level = []
    for node in path:
        below = sharing(paths, node)
        used = sum(trained[k] for k in below)
        level.append(sum(apart[k] for k in below) / math.sqrt(used) / len(below) if used else 0.0)
    answer, step = {}, 0.0
    for d in range(1, len(path)):
        here = level[d] - level[d - 1]
        step = step if abs(here) < 1e-8 and d > 1 else here
        answer[path[d]] = step + level[d]
    return answer


def some(reward: Tensor, group: Tensor, trained: list[bool], most: int, seeds: list[str]) -> list[bool]:
    """At most so many trained rows of each question: in the order of a shuffle, the first of the best rows, then the others."""
    answer = list(trained)
    for g, seed in enumerate(seeds):
        mine = [i for i in range(len(trained)) if trained[i] and int(group[i]) == g]
        if len(mine) <= most:
            continue
        drawn = random.Random(seed).sample(mine, len(mine))
        best = next(i for i in drawn if reward[i] == reward[mine].max())
        chosen = [best, *(i for i in drawn if i != best)][:most]
        for i in mine:
            answer[i] = i in chosen
    return answer
