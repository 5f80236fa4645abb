"""Growing trees: rounds of buds, requests, new nodes; then grading. Every tree goes at its own pace."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from numbers import Real
from typing import Any

from ramulus.core.task import Path, Reward, Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Engine, Request, Sampling, Segment, sample_all, together
from ramulus.grow.branching import Branching, Bud, depth, paths
from ramulus.grow.pruning import Pruning
from ramulus.grow.stop import Decode, Stop

OnTree = Callable[[Tree], Awaitable[None] | None]
Rewards = Sequence[tuple[Reward, float, str]]
"""(reward, weight in the total, name of its part in the verdict) of each."""


PATIENCE = 0.005  # seconds for which the rewards of a tree are asked one after the other


class RewardError(ValueError):
    """A reward raised, or returned what is no reward; names the reward, the task and the remedy."""


async def grow_forest(
    trees: Sequence[Tree],
    engine: Engine,
    branching: Branching,
    sampling: Sampling,
    stop: Stop,
    pruning: Sequence[Pruning] = (),
    on_tree: OnTree | None = None,
) -> list[Tree]:
    """Grow trees concurrently, none waiting for another; `on_tree` (grading, say) is awaited as each of them is done."""
    return await together(grow_tree(tree, engine, branching, sampling, stop, pruning, on_tree) for tree in trees)


async def grow_tree(
    tree: Tree,
    engine: Engine,
    branching: Branching,
    sampling: Sampling,
    stop: Stop,
    pruning: Sequence[Pruning] = (),
    on_tree: OnTree | None = None,
) -> Tree:
    """Grow a tree until `branching` has no more buds; paths that still live then end by length, and `on_tree` is awaited."""
    while await grow_round(tree, engine, branching, sampling, stop, pruning):
        pass
    return await close(tree, on_tree)


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
    segments = await sample_all(engine, [request for _, request in wanted])
    for (node, request), segment in zip(wanted, segments, strict=True):
        fill(node, request, segment)
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
    wanted = []
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
        until = partial(stop, response, most=most)
        wanted.append((node, Request(prefix, samplings[most], until, seed_of(tree, node), stop.ends)))
    return wanted


def fill(node: Node, request: Request, segment: Segment) -> None:
    """Write down what was sampled for an empty node."""
    node.tokens, node.logprobs, node.kept = segment.tokens, segment.logprobs, segment.kept
    node.entropy, node.temperature, node.version = segment.entropy, segment.temperature, segment.version
    node.finish = segment.finish
    if node.finish is None and len(node.tokens) < request.sampling.max_tokens:  # the engine ran out of context
        node.finish = "length"


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
        leaves.append(tree.add(tree.root, list(tokens[:limit]), Author.EXPERT, **fields))
    return leaves


async def grade(
    tree: Tree, rewards: Rewards, decode: Decode, filter_overlong: bool = False, leaves: Sequence[Node] | None = None
) -> Tree:
    """Give every ended policy path that was not pruned its reward (the weighted total) and its verdict; once, not again.

    The verdict holds each reward's value by name, `correct` and `answer` from the first reward that tells them, and any
    other part as NAME/PART. Rewards run concurrently, plain functions in threads. With `filter_overlong` a path that ended
    by length has a verdict but no reward: it is in no mean and no gradient. `leaves` are graded in place of the policy's
    where given. Raises RewardError.
    """
    leaves = paths(tree) if leaves is None else leaves
    leaves = [leaf for leaf in leaves if leaf.finish not in (None, "pruned") and not leaf.verdict]
    if leaves and not rewards:
        raise ValueError("sampled paths cannot be graded without a reward: give at least one")
    given = [(tuple(leaf.response()), leaf) for leaf in leaves]
    ways = [Path(decode(list(tokens)), tokens, leaf.finish) for tokens, leaf in given]
    answers = await judged(tree, [(way, reward, name) for way in ways for reward, _, name in rewards])
    for i, leaf in enumerate(leaves):
        total = 0.0
        leaf.verdict = {}
        for (_, weight, name), parts in zip(rewards, answers[i * len(rewards) : (i + 1) * len(rewards)], strict=True):
            total += weight * parts["reward"]
            leaf.verdict[name] = parts["reward"]
            for key, value in parts.items():
                if key != "reward":
                    leaf.verdict.setdefault(key if key in ("correct", "answer") else f"{name}/{key}", value)
        leaf.reward = None if filter_overlong and leaf.finish == "length" else total
    return tree


async def judged(tree: Tree, questions: Sequence[tuple[Path, Reward, str]]) -> list[dict[str, Any]]:
    """What each reward says of its path: plain numbers and strings by part, `reward` a finite float; all side by side, coroutines in this loop."""
    kinds = {id(reward): waits(reward) for reward in {id(reward): reward for _, reward, _ in questions}.values()}
    waiting = [i for i, (_, reward, _) in enumerate(questions) if kinds[id(reward)]]
    plain = [i for i, (_, reward, _) in enumerate(questions) if not kinds[id(reward)]]
    if not waiting:
        return await asked(tree, questions)
    others = asked(tree, [questions[i] for i in plain])
    first, *answers = await together([others, *(judge(tree, *questions[i]) for i in waiting)])
    known = dict(zip(plain + waiting, first + answers, strict=True))
    return [known[i] for i in range(len(questions))]


async def asked(tree: Tree, questions: Sequence[tuple[Path, Reward, str]]) -> list[dict[str, Any]]:
    """Of plain functions, which run in threads so that they never hold up the sampling: in one while they are quick, else each in its own."""
    if not questions:
        return []
    numbers = iter(range(len(questions)))  # whoever takes the next one asks it
    calls = [(reward, tree.task, path) for path, reward, _ in questions]
    first = asyncio.ensure_future(asyncio.to_thread(each_of, calls, numbers))
    try:
        await asyncio.wait({first}, timeout=PATIENCE)
        slow = list(numbers)
        answers = await together([first, *(judge(tree, *questions[i]) for i in slow)])
    finally:
        deque(numbers, 0)  # the thread goes no further
    given: dict[int, tuple[Any, Exception | None]] = answers[0]
    rest = [i for i, (said, error) in given.items() if error is not None or inspect.isawaitable(said)]
    more = await together(judge(tree, *questions[i], given[i]) for i in rest) if rest else []
    known = dict(zip(slow + rest, answers[1:] + more, strict=True))
    return [known[i] if i in known else checked(tree, name, given[i][0]) for i, (_, _, name) in enumerate(questions)]


def waits(reward: Reward) -> bool:
    """Whether a reward is a coroutine function."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def each_of(calls: Sequence[tuple[Reward, Task, Path]], numbers: Iterator[int]) -> dict[int, tuple[Any, Exception | None]]:
    """What those calls answer whose numbers nobody else takes."""
    return {i: caught(*calls[i]) for i in numbers}


async def judge(
    tree: Tree, path: Path, reward: Reward, name: str, given: tuple[Any, Exception | None] | None = None
) -> dict[str, Any]:
    """What one reward says of one path; `given` is its answer or error where it was asked already."""
    try:
        said = await ask(reward, tree.task, path, given)
    except Exception as error:
        where, remedy = f"reward {name!r} on task {tree.task.id!r}", "let it return a number for any text a model may write"
        raise RewardError(f"{where} raised {type(error).__name__}: {error}; {remedy}") from error
    return checked(tree, name, said)


async def ask(reward: Reward, task: Task, path: Path, given: tuple[Any, Exception | None] | None) -> Any:
    """Call a reward: coroutines in this loop, plain functions in a thread."""
    if given is None and waits(reward):
        said: Any = reward(task, path)
    else:
        said, error = await asyncio.to_thread(caught, reward, task, path) if given is None else given
        if error is not None:
            raise error
    return await said if inspect.isawaitable(said) else said


def checked(tree: Tree, name: str, said: Any) -> dict[str, Any]:
    """The parts of an answer, if it is one; raises RewardError."""
    where = f"reward {name!r} on task {tree.task.id!r}"
    parts = said if isinstance(said, dict) else {"reward": said}
    if not isinstance(parts.get("reward"), Real) or not math.isfinite(float(parts["reward"])):
        raise RewardError(f"{where} returned {said!r}: it must return a finite number, or a dict with one as 'reward'")
    for key, value in parts.items():
        if not isinstance(key, str) or not isinstance(value, Real | str):
            raise RewardError(
                f"{where} returned {value!r} as {key!r}: the parts of a reward are numbers or strings by name"
            )
    return {key: value if isinstance(value, str) else float(value) for key, value in parts.items()}


def caught(reward: Reward, task: Task, path: Path) -> tuple[Any, Exception | None]:
    """The answer or the error of a call: a StopIteration must not reach a future, it would hang there."""
    try:
        return reward(task, path), None
    except Exception as error:
        return None, error
