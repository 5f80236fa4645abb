"""Growing trees: rounds of buds, requests, new nodes. Every tree goes at its own pace."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Engine, Request, Sampling, Segment, Until, together
from ramulus.grow.branching import Branching, Bud, depth, length, paths
from ramulus.grow.pruning import Pruning
from ramulus.grow.stop import Stop

OnTree = Callable[[Tree], Awaitable[None] | None]

Between = Callable[[list[Tree]], Awaitable[None]]
"""Called after every round of a forest with the trees that grew in it, in the order they were given."""


async def grow_forest(
    trees: Sequence[Tree],
    engine: Engine,
    branching: Branching,
    sampling: Sampling,
    stop: Stop,
    pruning: Sequence[Pruning] = (),
    on_tree: OnTree | None = None,
    between: Between | None = None,
) -> list[Tree]:
    """Grow trees until `branching` has no more buds; paths that still live then end by length, and `on_tree` (grading, say) is awaited.

    Trees grow concurrently, none waiting for another, and `on_tree` comes as each is done. With `between`, all wait for the last one after
    each round and `between` sees whole rounds, in the order of `trees`, which depends on no clock; `on_tree` comes once all are done.
    """
    how = engine, branching, sampling, stop, pruning

    async def alone(tree: Tree) -> Tree:
        while await grow_round(tree, *how):
            pass
        return await close(tree, on_tree)

    if between is None:
        return await together(alone(tree) for tree in trees)
    living = list(trees)
    while living:
        grew = await together(grow_round(tree, *how) for tree in living)
        living = [tree for tree, more in zip(living, grew, strict=True) if more]
        if living:
            await between(living)
    return await together(close(tree, on_tree) for tree in trees)


async def close(tree: Tree, on_tree: OnTree | None) -> Tree:
    """End the paths that still live by length, and await `on_tree`."""
    for leaf in paths(tree):
        leaf.finish = leaf.finish or "length"
    answer = on_tree(tree) if on_tree is not None else None
    if answer is not None:
        await answer
    return tree


async def grow_round(
    tree: Tree, engine: Engine, branching: Branching, sampling: Sampling, stop: Stop, pruning: Sequence[Pruning] = ()
) -> bool:
    """One round: buds, their segments sampled concurrently, new nodes filled, then pruned; False when there is no bud."""
    buds = branching(tree)
    if not buds:
        return False
    tree.fresh = tree.serial
    nodes = [graft(tree, bud) for bud in buds]
    tree.rounds += 1
    wanted = requests(tree, nodes, buds, sampling, stop)
    segments = await _sampled(engine, [request for _, request in wanted])
    for (node, request), segment in zip(wanted, segments, strict=True):
        _fill(node, request, segment, stop)
    prune(tree, pruning)
    return True


def prune(tree: Tree, pruning: Sequence[Pruning]) -> None:
    """End the policy's paths below what the rules choose."""
    for rule in pruning:
        for node in rule(tree):
            for leaf in node.leaves():
                if leaf.author is Author.POLICY:
                    leaf.finish = "pruned"


def graft(tree: Tree, bud: Bud) -> Node:
    """The empty living node of a bud, the path above it brought to the bud's count of levels.

    TreePO counts ceil(cut / segment) levels above a fallback cut. A cut in a segment that itself began off the grid can
    have one more by Tree.cut; it goes to the rest of that segment, so existing paths keep theirs.
    """
    node = tree.graft(bud.node, bud.drop, bud.why)
    above = node.parent
    if bud.levels is None or above is None:
        return node
    surplus = depth(above) - bud.levels
    rest = [child for child in above.children if child is not node]
    if 0 < surplus <= above.levels and len(rest) == 1:
        above.levels -= surplus
        rest[0].levels += surplus
        surplus = 0
    if surplus:
        raise ValueError(
            f"a bud asks for {bud.levels} levels above it where its path has {depth(above)}: leave levels out"
        )
    return node


def requests(
    tree: Tree, nodes: Sequence[Node], buds: Sequence[Bud], sampling: Sampling, stop: Stop
) -> list[tuple[Node, Request]]:
    """What to sample for the empty nodes of a round; a path without room left ends by length. Siblings share what they can."""
    above: dict[Node | None, tuple[list[int], tuple[int, ...]]] = {}  # response and whole text down to each parent
    samplings: dict[int, Sampling] = {}
    wanted, rule = [], stop.rule
    for node, bud in zip(nodes, buds, strict=True):
        if node.parent not in above:
            above[node.parent] = node.response(), tuple(node.prefix())
        response, prefix = above[node.parent]
        most = min(bud.max_tokens or sampling.max_tokens, stop.max_tokens - len(response))
        if most < 1:
            node.finish = "length"
            continue
        if most not in samplings:
            samplings[most] = replace(sampling, max_tokens=most)
        wanted.append((node, Request(prefix, samplings[most], rule, seed_of(tree, node), stop.until(response, most))))
    return wanted


async def _sampled(engine: Engine, wanted: Sequence[Request]) -> list[Segment]:
    """A segment of each request, cut where its `until` ends it: asked by the engine, or here where the engine does not ask."""
    if not {"until", "strings"} - engine.features or all(request.until is None for request in wanted):
        return await engine.sample(wanted)
    plain = []
    for request in wanted:
        rule = request.stop if "strings" in engine.features else replace(request.stop, strings=())  # `until` knows them too
        plain.append(replace(request, stop=rule, until=request.until if "until" in engine.features else None))
    segments = await engine.sample(plain)
    if "until" in engine.features:
        return segments
    return [replayed(request.until, segment) for request, segment in zip(wanted, segments, strict=True)]


def replayed(until: Until | None, segment: Segment) -> Segment:
    """The segment as an engine that asks `until` after every token would have ended it: what was sampled beyond is thrown away."""
    if until is None:
        return segment
    tokens = segment.tokens.tolist()
    for n in range(1, len(tokens) + 1):
        if (finish := until(tokens[:n])) is not None:
            columns = {name: _cut(getattr(segment, name), n) for name in ("tokens", "logprobs", "kept", "entropy", "temperature", "versions")}
            newest = segment.newest if segment.versions is None else segment.versions[n - 1]
            return replace(segment, finish=finish, newest=newest, **columns)
    return segment


def _cut(column: Any, n: int) -> Any:
    """The first n entries of a column; one that is a number or absent stays."""
    return column[:n] if isinstance(column, array) else column


def _fill(node: Node, request: Request, segment: Segment, stop: Stop) -> None:
    """Write down what was sampled for an empty node; one that has all the tokens it may have ends by length."""
    count = len(segment.tokens)
    node.tokens, node.logprobs, node.kept, node.entropy = segment.tokens, segment.logprobs, segment.kept, segment.entropy
    node.temperature = _asked(request) if segment.temperature is None else segment.temperature
    node.finish, node.version, node.newest, node.versions = segment.finish, segment.version, segment.newest, segment.versions
    if node.finish is None and (count < request.sampling.max_tokens or length(node) >= stop.max_tokens):
        node.finish = "length"


def _asked(request: Request) -> float:
    """The temperature of a request whose engine recorded none; ValueError for a rule, whose temperatures nobody knows then."""
    if callable(request.sampling.temperature):
        raise ValueError(f"the engine did not record the temperatures of {request.sampling.temperature}: sample with one that does, or with a number")
    return request.sampling.temperature


def seed_of(tree: Tree, node: Node) -> int:
    """63 bits from the run's seed, the task, its visit and the bud: never from the order of arrival."""
    name = f"{tree.seed}/{tree.task.id}/{tree.visit}/{node.id}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1


def demonstrate(tree: Tree, n: int, limit: int | None = None) -> list[Node]:
    """Graft the first `n` demonstrations of the task as expert leaves with reward 1; fewer where the task has fewer.

    One above `limit` tokens is cut there and ends by length. Raises ValueError for a demonstration without tokens.
    """
    if n < 0 or (limit is not None and limit < 1):
        raise ValueError(f"demonstrate wants n >= 0 and a limit of at least 1 token, got n={n} and limit={limit}")
    leaves = []
    for tokens in tree.task.demonstrations[:n]:
        if not tokens:
            raise ValueError(f"task {tree.task.id!r} has an empty demonstration: give it text, or leave it out")
        finish = "eos" if limit is None or len(tokens) <= limit else "length"
        fields = {"finish": finish, "reward": 1.0, "why": "demonstration"}
        leaves.append(tree.add(tree.root, tokens[:limit], Author.EXPERT, **fields))
    return leaves
