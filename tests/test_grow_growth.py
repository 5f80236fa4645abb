"""Growth: rounds, rooms, concurrency on a counted clock, demonstrations, grading."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from growing import EOS, Clock, Recorder, chain, decode, grow_tree, plant
from ramulus.core.store import dump, load
from ramulus.core.task import GraderLost, Path, Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.toy import ToyEngine
from ramulus.grow import grading
from ramulus.grow.branching import Bud, Star, length, paths
from ramulus.grow.grading import RewardError, grade
from ramulus.grow.growth import demonstrate, grow_forest, grow_round, seed_of
from ramulus.grow.segments import Segments
from ramulus.grow.stop import BoxedAnswer, Repeats, Stop
from ramulus.grow.threads import DaemonThreads

STOP = Stop((EOS,), 20)
NO_EOS = ToyEngine(vocab=8, table={(): [-50.0] + [0.0] * 7})


def test_star_grows_a_group_in_one_round() -> None:
    engine = Recorder(vocab=8, seed=3)
    engine.version = 7
    tree = asyncio.run(grow_tree(plant(), engine, Star(5), Sampling(12, temperature=0.7, top_p=0.8), STOP))
    assert (tree.rounds, len(tree.leaves()), len(engine.seen)) == (1, 5, 5)
    assert len({request.seed for request, _ in engine.seen}) == 5
    for leaf in tree.leaves():
        assert leaf.parent is tree.root
        assert (leaf.version, leaf.levels, leaf.why) == (7, 1, "star")
        assert leaf.temperature == 0.7
        assert any(leaf.kept)
        assert leaf.finish == ("eos" if leaf.tokens[-1] == EOS else "length")
        assert EOS not in leaf.tokens[:-1]
    assert dump(load(dump(tree))) == dump(tree)
    assert asyncio.run(grow_tree(plant(), engine, Star(0), Sampling(12), STOP)).leaves() == []


def test_a_segment_has_no_more_room_than_the_response() -> None:
    engine = Recorder(vocab=8, table={(): [-50.0] + [0.0] * 7})
    tree = asyncio.run(grow_tree(plant(), engine, Segments(4, 9, 8), Sampling(99), STOP))
    assert [request.sampling.max_tokens for request, _ in engine.seen] == [8, 8, 8, 8, 8, 8, 4, 4, 4, 4]
    assert all(length(leaf) == 20 and leaf.finish == "length" for leaf in tree.leaves())
    full = plant()
    leaf = chain(full, [20], None)

    @dataclass(frozen=True)
    class Once:
        needs = ()

        def __call__(self, tree: Tree) -> list[Bud]:
            return [Bud(leaf)] if tree.rounds == 0 else []

    grown = asyncio.run(grow_tree(full, engine, Once(), Sampling(99), STOP))
    assert [(list(node.tokens), node.finish) for node in grown.leaves()] == [([], "length")], (
        "nothing to sample, nothing sent"
    )
    assert len(engine.seen) == 10


def test_an_engine_that_runs_out_of_context_ends_the_path() -> None:
    class Short(ToyEngine):
        async def sample(self, requests: Sequence[Request]) -> list[Segment]:
            return await super().sample([replace(one, sampling=replace(one.sampling, max_tokens=3)) for one in requests])

    tree = asyncio.run(grow_tree(plant(), Short(table=NO_EOS.table), Segments(2, 9, 8), Sampling(99), STOP))
    assert [(len(leaf.tokens), leaf.finish) for leaf in tree.leaves()] == [(3, "length")] * 2


def test_seeds_come_from_names_not_from_arrival() -> None:
    tree = plant("x", 5, 2)
    node = tree.graft(tree.root)
    assert seed_of(tree, node) == seed_of(plant("x", 5, 2), node)
    others = [plant("y", 5, 2), plant("x", 6, 2), plant("x", 5, 3)]
    assert len({seed_of(t, node) for t in [tree, *others]}) == 4
    assert 0 <= seed_of(tree, node) < 2**63


def test_one_round_at_a_time() -> None:
    tree, rule = plant(), Segments(4, 3, 4)

    async def rounds() -> list[int]:
        sizes = []
        while await grow_round(tree, NO_EOS, rule, Sampling(9), STOP):
            sizes.append(len(tree.leaves()))
            assert all(leaf.id >= tree.fresh for leaf in tree.leaves())
        return sizes

    assert asyncio.run(rounds()) == [2, 4, 4]
    assert tree.rounds == 3
    assert asyncio.run(grow_round(tree, NO_EOS, rule, Sampling(9), STOP)) is False


def test_a_bud_whose_levels_cannot_be_had_is_an_error() -> None:
    tree = plant()
    leaf = chain(tree, [4, 4])

    @dataclass(frozen=True)
    class Wrong:
        needs = ()

        def __call__(self, tree: Tree) -> list[Bud]:
            return [Bud(leaf, 4, levels=2)]

    with pytest.raises(ValueError, match="asks for 2 levels above it where its path has 1"):
        asyncio.run(grow_tree(tree, NO_EOS, Wrong(), Sampling(9), STOP))


def ticks(names: list[str], slow: int = -1) -> dict[str, int]:
    """The engine's clock when each tree was done; the tree `snail` has a prompt that is decoded ten times slower."""
    engine, done = Clock(slow=slow, vocab=8, spread=1.0), {}
    forest = [plant(name, prompt=(slow if name == "snail" else 1, 2)) for name in names]

    def note(tree: Tree) -> None:
        done[tree.task.id] = engine.now

    asyncio.run(grow_forest(forest, engine, Segments(4, 4, 4, 1), Sampling(9), STOP, on_tree=note))
    return done


def test_a_slow_tree_holds_up_nobody() -> None:
    names = ["a", "b", "snail", "c", "d"]
    together = ticks(names, slow=7)
    alone = {name: ticks([name], slow=7)[name] for name in names}
    assert together == alone
    assert len(set(together.values())) >= 4, "each at its own pace"
    assert together["snail"] > 3 * max(together[name] for name in "abcd")


def test_grading_never_delays_sampling() -> None:
    async def run() -> list[Tree]:
        grown: list[str] = []
        everyone, in_thread = asyncio.Event(), threading.Event()

        async def patient(task: Task, path: Path) -> float:
            await everyone.wait()  # a reward that ends only when all trees have grown
            return 1.0

        def blocking(task: Task, path: Path) -> float:
            assert in_thread.wait(20)  # the same for a plain function: it must not sit in the event loop
            return 1.0

        async def on_tree(tree: Tree) -> None:
            grown.append(tree.task.id)
            if len(grown) == 4:
                everyone.set()
                in_thread.set()
            await grade(tree, ((patient, 1.0, "patient"), (blocking, 1.0, "blocking")), decode)

        trees = [plant(f"t{i}") for i in range(4)]
        return await grow_forest(trees, ToyEngine(), Star(1), Sampling(9), STOP, on_tree=on_tree)

    forest = asyncio.run(asyncio.wait_for(run(), 30))
    assert [tree.task.id for tree in forest] == ["t0", "t1", "t2", "t3"]
    assert all(leaf.reward == 2.0 for tree in forest for leaf in tree.leaves())


def test_an_engine_that_fails_stops_everything_and_says_why() -> None:
    class Broken(Clock):
        async def one(self, request: Request) -> Segment:
            if request.prefix[0] == 3:
                raise RuntimeError("out of memory")
            return await super().one(request)

    async def run() -> int:
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            await grow_forest([plant(), plant("b", prompt=(3,))], Broken(vocab=8), Star(2), Sampling(9), STOP)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(run()) <= 1, "only the clock of the engine is left"


def demonstrated(*demonstrations: tuple[int, ...]) -> Tree:
    return Tree.plant(Task("d", (1, 2), "d", demonstrations=demonstrations))


def test_demonstrations() -> None:
    tree = demonstrated((3, 4, EOS), (5, EOS), (6, EOS))
    assert demonstrate(tree, 0) == []
    leaves = demonstrate(tree, 2)
    assert [list(leaf.tokens) for leaf in tree.leaves()] == [[3, 4, EOS], [5, EOS]]
    for leaf in leaves:
        assert (leaf.author, leaf.finish, leaf.reward, leaf.levels, list(leaf.logprobs)) == (Author.EXPERT, "eos", 1.0, 1, [])
    assert len(demonstrate(demonstrated((3, EOS)), 5)) == 1
    (cut,) = demonstrate(demonstrated((3, 4, 5, EOS)), 1, limit=2)
    assert (list(cut.tokens), cut.finish) == ([3, 4], "length")
    with pytest.raises(ValueError, match="'d' has an empty demonstration"):
        demonstrate(demonstrated(()), 1)
    with pytest.raises(ValueError, match="got n=-1"):
        demonstrate(tree, -1)


@pytest.mark.parametrize("rule", [Star(3), Segments(3, 4, 4)])
def test_demonstrations_stand_beside_growth_untouched(rule: object) -> None:
    tree = demonstrated((3, 4, EOS))
    demonstrate(tree, 1)
    asyncio.run(grow_tree(tree, ToyEngine(), rule, Sampling(20), STOP))  # type: ignore[arg-type]
    asyncio.run(grade(tree, ((lambda task, path: 0.5, 1.0, "half"),), decode))
    expert, *policy = sorted(tree.leaves(), key=lambda leaf: -leaf.author)
    assert (list(expert.tokens), expert.reward, expert.verdict, expert.finish) == ([3, 4, EOS], 1.0, {}, "eos")
    assert len(policy) == len(paths(tree)) == 3
    assert all(leaf.reward == 0.5 for leaf in policy)


def graded(rewards: tuple, filter_overlong: bool = False) -> Tree:
    tree = plant("job")
    for finish in ("eos", "length", "pruned"):
        chain(tree, [1, 2], finish)
    return asyncio.run(grade(tree, rewards, decode, filter_overlong))


@dataclass(frozen=True)
class Later:
    """An asynchronous reward object."""

    async def __call__(self, task: Task, path: Path) -> dict[str, object]:
        await asyncio.sleep(0)
        return {"reward": path.length, "correct": True, "answer": path.text, "steps": 2}


def test_grading_weighs_parts_and_leaves_pruned_paths_alone() -> None:
    seen = []

    def first(task: Task, path: Path) -> dict[str, object]:
        seen.append((task.id, path))
        return {"reward": 1, "correct": 0, "steps": 9}

    tree = graded(((first, 0.5, "first"), (Later(), 2.0, "later"), (lambda task, path: 1.0, -1.0, "penalty")))
    eos, long, pruned = tree.leaves()
    assert eos.reward == long.reward == 0.5 * 1 + 2.0 * 3 - 1.0
    assert eos.verdict == {
        "first": 1.0,
        "correct": 0.0,
        "first/steps": 9.0,
        "later": 3.0,
        "answer": "aaa",
        "later/steps": 2.0,
        "penalty": 1.0,
    }
    assert list(eos.verdict) == ["first", "correct", "first/steps", "later", "answer", "later/steps", "penalty"]
    assert (pruned.reward, pruned.verdict) == (None, {})
    assert {(name, path.finish) for name, path in seen} == {("job", "eos"), ("job", "length")}
    assert seen[0][1] == Path("aaa", (1, 1, 1), seen[0][1].finish)
    assert dump(load(dump(tree))) == dump(tree)


def starred(n: int) -> Tree:
    """A tree of n finished paths."""
    tree = plant("job")
    for i in range(n):
        tree.add(tree.root, [i + 1], Author.POLICY, finish="eos")
    return tree


def test_quick_rewards_share_a_thread_and_slow_ones_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def quick(task: Task, path: Path) -> float:
        threads.add(threading.get_ident())
        return float(path.tokens[0])

    monkeypatch.setattr(grading, "PATIENCE", 60.0)
    tree = asyncio.run(grade(starred(6), ((quick, 1.0, "quick"),), decode))
    assert [leaf.reward for leaf in tree.leaves()] == [1, 2, 3, 4, 5, 6]
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    everybody = threading.Barrier(4)

    def slow(task: Task, path: Path) -> float:
        if path.tokens[0] > 1:  # the first one tells that they are slow; the others need each other to go on
            everybody.wait(20)
        return float(path.tokens[0])

    monkeypatch.setattr(grading, "PATIENCE", -1.0)
    tree = asyncio.run(grade(starred(5), ((slow, 1.0, "slow"),), decode))
    assert [leaf.reward for leaf in tree.leaves()] == [1, 2, 3, 4, 5]


def test_rewards_that_wait_do_so_side_by_side() -> None:
    """Coroutines, plain functions that answer with something to wait for, and plain ones, of all paths of a tree."""
    begun: list[str] = []

    async def meeting(name: str) -> float:
        begun.append(name)
        while len(begun) < 8:  # all are there before any goes on
            await asyncio.sleep(0)
        return 1.0

    async def coroutine(task: Task, path: Path) -> float:
        return await meeting("coroutine")

    rewards = ((coroutine, 1.0, "a"), (lambda task, path: meeting("awaitable"), 10.0, "b"), (lambda task, path: 0.5, 1.0, "c"))
    tree = asyncio.run(asyncio.wait_for(grade(starred(4), rewards, decode), 30))
    assert [leaf.reward for leaf in tree.leaves()] == [11.5] * 4
    assert sorted(begun) == ["awaitable"] * 4 + ["coroutine"] * 4


def test_overlong_paths_can_be_left_out() -> None:
    eos, long, _ = graded(((Later(), 1.0, "later"),), filter_overlong=True).leaves()
    assert eos.reward == 3.0
    assert (long.reward, long.verdict["correct"]) == (None, 1.0)


def test_a_reward_called_as_a_verdicts_own_part_takes_no_place_of_it() -> None:
    def tells(task: Task, path: Path) -> dict[str, float | str]:
        return {"reward": 1.0, "correct": 1.0, "answer": "3"}

    rewards = ((lambda task, path: -1.0, 1.0, "correct"), (tells, 1.0, "tells"), (lambda task, path: 0.25, 1.0, "answer"))
    for leaf in asyncio.run(grade(starred(2), rewards, decode)).leaves():
        assert leaf.verdict == {"correct_reward": -1.0, "tells": 1.0, "correct": 1.0, "answer": "3", "answer_reward": 0.25}
        assert leaf.reward == 0.25
    for value, called in ((1.0, {"correct": 1.0}), (0.0, {"correct": 0.0}), (0.5, {})):
        (leaf,) = asyncio.run(grade(starred(1), ((lambda task, path, value=value: value, 1.0, "correct"),), decode)).leaves()
        assert leaf.verdict == {"correct_reward": value, **called}


def test_a_call_waits_for_no_other_while_threads_are_to_spare() -> None:
    """Whatever the order in which threads fall idle and calls come: each of `most` calls that hang has a thread of its own."""
    for _ in range(50):
        pool, go = DaemonThreads(3), threading.Event()
        for _ in range(2):
            pool.submit(int).result(20)
        begun = [threading.Event() for _ in range(3)]

        def hang(mine: threading.Event, go: threading.Event = go) -> bool:
            mine.set()
            return go.wait(20)

        hanging = [pool.submit(hang, mine) for mine in begun]
        assert all(mine.wait(20) for mine in begun)
        assert pool.count == 3
        go.set()
        assert all(future.result(20) for future in hanging)


def raising(task: Task, path: Path) -> float:
    raise KeyError("gold")


def stopping(task: Task, path: Path) -> float:
    return next(iter([]))


async def failing(task: Task, path: Path) -> float:
    raise TimeoutError("no answer in 5 s")


def lost(task: Task, path: Path) -> float:
    raise GraderLost("the grader cannot run: free some memory")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "reward 'r' on task 'job' raised KeyError: 'gold'; let it return a number"),
        (stopping, "raised StopIteration"),
        (failing, "raised TimeoutError: no answer in 5 s"),
        (lost, "reward 'r' on task 'job': the grader cannot run: free some memory$"),
        (lambda task, path: math.nan, "reward 'r' on task 'job' returned nan: it must return a finite number"),
        (lambda task, path: math.inf, "returned inf"),
        (lambda task, path: None, "returned None"),
        (lambda task, path: "1", "returned '1'"),
        (lambda task, path: {"correct": 1.0}, "or a dict with one as 'reward'"),
        (lambda task, path: 10**400, "beyond what a float holds"),
        (lambda task, path: {"reward": 1.0, "correct": 10**400}, "beyond what a float holds"),
        (lambda task, path: {"reward": 1.0, "size": -(10**400)}, "beyond what a float holds"),
        (lambda task, path: {"reward": 1.0, "why": ["x"]}, r"returned \['x'\] as 'why'"),
        (lambda task, path: {"reward": 1.0, "correct": math.nan}, "returned nan as 'correct': it must be 1 or True where the path solves its task"),
        (lambda task, path: {"reward": -1.0, "correct": -1.0}, "returned -1.0 as 'correct': .*, 0 or False where not, or a share between"),
        (lambda task, path: {"reward": 1.0, "correct": 7}, "returned 7 as 'correct'"),
        (lambda task, path: {"reward": 1.0, "correct": -math.inf}, "returned -inf as 'correct'"),
        (lambda task, path: {"reward": 1.0, "correct": "yes"}, "returned 'yes' as 'correct'"),
        (lambda task: 1.0, "a reward is called with a task and a path: write def <lambda>"),
        (lambda task, path, gold: 1.0, "a reward is called with a task and a path"),
        (lambda task, path, *, seed: 1.0, "a reward is called with a task and a path"),
        (lambda task, path: path.nothing(), "has no attribute 'nothing'; let it return a number"),
    ],
)
def test_a_bad_reward_is_named(reward: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        graded(((lambda task, path: 1.0, 1.0, "fine"), (reward, 1.0, "r")))


@pytest.mark.parametrize(
    "value",
    [np.bool_(True), np.float32(1), np.int64(1), np.array(1.0), np.array([1]), torch.tensor(1.0), torch.tensor([True])],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_numpy_and_torch_are_rewards(value: object) -> None:
    tree = graded(((lambda task, path: value, 1.0, "r"), (lambda task, path: {"reward": value, "correct": value}, 1.0, "s")))
    leaf = paths(tree)[0]
    assert (leaf.reward, leaf.verdict["correct"]) == (2.0, 1.0)
    assert {type(part) for part in leaf.verdict.values()} == {float}


@pytest.mark.parametrize(("called", "taken"), [(0.1 * 3 + 0.7 + 1e-16, 1.0), (1.0000000000000002, 1.0), (-1e-17, 0.0), (True, 1.0), (0.25, 0.25)])
def test_a_share_that_misses_1_by_rounding_is_1(called: float, taken: float) -> None:
    tree = graded(((lambda task, path: {"reward": 1.0, "correct": called}, 1.0, "r"),))
    assert paths(tree)[0].verdict["correct"] == taken


@pytest.mark.parametrize("value", [np.array([1.0, 2.0]), np.array([]), torch.ones(2), np.float32("nan"), np.array("1")])
def test_arrays_are_no_rewards(value: object) -> None:
    with pytest.raises(RewardError, match="returned"):
        graded(((lambda task, path: value, 1.0, "r"),))


def test_no_reward_at_all() -> None:
    with pytest.raises(ValueError, match="at least one"):
        graded(())
    assert asyncio.run(grade(plant(), (), decode)).leaves() == [], "supervised: nothing sampled, nothing to grade"


class Plain(ToyEngine):
    """A toy that asks nobody and knows no strings, as a plain server: it honours token ids and records no entropy."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.features = frozenset({"kept"})

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        assert all(request.until is None and not request.stop.strings for request in requests)
        return [replace(segment, entropy=None) for segment in await super().sample(requests)]


REREAD = {
    "answer": Stop((EOS,), 20, decode, BoxedAnswer()),
    "eos after an answer": Stop((EOS,), 20, decode, BoxedAnswer(and_eos=True)),
    "repetition": Stop((EOS,), 20, decode, None, Repeats(1, 3, every=1)),
    "strings": Stop((EOS,), 20, decode, strings=("ab", "cd")),
    "ids": Stop((EOS, 3), 20),
}


@pytest.mark.parametrize("name", REREAD)
@pytest.mark.parametrize("sampling", [Sampling(99), Sampling(99, temperature=0.7, top_p=0.9)])
def test_an_engine_that_asks_nobody_grows_the_same_trees(name: str, sampling: Sampling) -> None:
    """What came back is read again, token by token, and cut in every column; what was sampled beyond is counted by the engine alone."""
    stop = REREAD[name]

    def grown(engine: ToyEngine) -> list[Tree]:
        trees = [plant(f"t{i}", seed=i) for i in range(12)]
        return asyncio.run(grow_forest(trees, engine, Segments(4, 4, 5, 2), sampling, stop))

    asked, plain = ToyEngine(vocab=8, spread=1.0, decode=decode), Plain(vocab=8, spread=1.0)
    pairs = [(a, b) for one, other in zip(grown(asked), grown(plain)) for a, b in zip(one.walk(), other.walk(), strict=True)]
    for a, b in pairs:
        assert (a.tokens, a.logprobs, a.kept, a.finish, a.levels) == (b.tokens, b.logprobs, b.kept, b.finish, b.levels)
        assert len(b.tokens) == len(b.logprobs) or b.author is Author.PROMPT
        assert b.entropy is None
    held = sum(len(b.tokens) for _, b in pairs if b.author is Author.POLICY)
    assert asked.counters()["sampled"] == held
    assert (plain.counters()["sampled"] > held) == (name in ("answer", "repetition", "strings"))
    assert {"ids": "eos", "eos after an answer": "answer", "strings": "stop"}.get(name, name) in {a.finish for a, _ in pairs}
