"""Signals: who provides a name, in which order, what is refused before work begins, and that a user's own one trains."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import run_forks
from ramulus.core.recipe_part import needed
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.grow.demonstration import Hinted
from ramulus.grow.segments import Segments
from ramulus.grow.worth import Estimated, LowValue
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.objective.token_weight import Product
from ramulus.run.config.override import override
from ramulus.run.config.resume import read_saved
from ramulus.run.signals import (
    SHIPPED,
    Concluded,
    ForwardInfluence,
    SignalContext,
    Signals,
    StepStarts,
    ordered,
    provided,
)
from ramulus.run.stage import check_signals

Column = tuple[Node, str, Sequence[float]]


@dataclass(frozen=True)
class Depth:
    """How many tokens of the response stand before each."""

    provides: ClassVar[tuple[str, ...]] = ("depth",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterator[Column]:
        for tree in trees:
            for node in tree.walk():
                if node.author is Author.POLICY:
                    before = sum(len(above.tokens) for above in node.line()[1:-1])
                    yield node, "depth", [float(before + at) for at in range(len(node.tokens))]


@dataclass(frozen=True)
class LateSteps:
    """The depth of tokens that begin a step, else 0; async, as one that asks the learner is."""

    provides: ClassVar[tuple[str, ...]] = ("late",)
    needs: ClassVar[tuple[str, ...]] = ("steps", "depth")

    async def __call__(self, trees: Sequence[Tree], context: SignalContext) -> list[Column]:
        nodes = [node for tree in trees for node in tree.walk() if node.author is Author.POLICY]
        return [
            (node, "late", [a * b for a, b in zip(node.signals["steps"], node.signals["depth"], strict=True)])
            for node in nodes
        ]


@dataclass(frozen=True)
class Wrong:
    """Writes what it is told to, whether that is right or not."""

    name: str = "wrong"
    size: int = 1

    provides: ClassVar[tuple[str, ...]] = ("wrong",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> list[Column]:
        return [(tree.leaves()[0], self.name, [0.0] * self.size) for tree in trees]


class Vocabulary:
    """A tokenizer of three tokens."""

    words = ("a", "\n", "Answer")

    def get_vocab(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.words[token] for token in row) for row in rows]


def supplied(signals: Sequence[object], names: Sequence[str]) -> list[Node]:
    """The leaves of a small tree that two paths share a line of, with these signals."""
    tree = Tree.plant(Task("t", (0,), "t"))
    stem = tree.add(tree.root, [0, 1], Author.POLICY)
    for tokens in ([0, 2, 0], [0, 1, 0]):
        tree.add(stem, tokens, Author.POLICY, finish="eos")
    context = SignalContext(None, Vocabulary())  # type: ignore[arg-type]
    asyncio.run(Signals(provided(signals), context)([tree], names))  # type: ignore[arg-type]
    return [stem, *tree.leaves()]


def test_what_a_signal_needs_is_computed_first() -> None:
    providers = provided((LateSteps(), Depth()))
    assert ordered(providers, ("late",)) == [StepStarts(), Depth(), LateSteps()]
    assert ordered(providers, ("depth", "late", "steps")) == [Depth(), StepStarts(), LateSteps()]
    nodes = supplied((LateSteps(), Depth()), ("late",))
    assert [list(node.signals["late"]) for node in nodes] == [[0, 0], [2, 0, 0], [2, 0, 4]]
    assert nodes[0].signals.keys() == {"late", "steps", "depth"}


def test_words_are_an_option_of_the_signal() -> None:
    assert [list(node.signals["concluded"]) for node in supplied((), ("concluded",))] == [[0, 0], [0, 0, 1], [0, 0, 0]]
    assert [list(node.signals["concluded"]) for node in supplied((Concluded(("\n",)),), ("concluded",))] == [[0, 0], [1, 1, 1], [1, 1, 1]]
    assert [list(node.signals["steps"]) for node in supplied((), ("steps",))] == [[1, 0], [1, 0, 0], [1, 0, 1]]


def test_a_recipe_comes_before_what_is_shipped_and_may_not_say_a_thing_twice() -> None:
    assert set(provided(())) == {"steps", "influence", "concluded", "value"} == {n for s in SHIPPED for n in s.provides}
    mine = ForwardInfluence(delta=1)
    assert provided((mine,))["influence"] is mine
    with pytest.raises(ValueError, match=r"ForwardInfluence\(delta=1\) and ForwardInfluence\(delta=2\) both provide the signal 'influence'"):
        check_signals(replace(run_forks.recipe(), signals=(mine, ForwardInfluence(delta=2))))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ForwardInfluence(delta=0)


def test_circles_are_refused() -> None:
    @dataclass(frozen=True)
    class Round(Depth):
        needs: ClassVar[tuple[str, ...]] = ("late",)

    with pytest.raises(ValueError, match="need each other in a circle: late from depth from late"):
        ordered(provided((LateSteps(), Round())), ("late",))


@pytest.mark.parametrize("wrong", [Wrong(size=2), Wrong(name="other", size=3)])
def test_a_column_is_one_number_a_token_of_a_name_that_is_provided(wrong: Wrong) -> None:
    with pytest.raises(ValueError, match=rf"wrote {wrong.size} numbers of '{wrong.name}' for a node of 3 tokens.*\(wrong\)"):
        supplied((wrong,), ("wrong",))
    supplied((Wrong(size=3),), ("wrong",))


@pytest.mark.parametrize("reader", ["pruning", "advantage", "signal"])
def test_a_name_that_nothing_provides_is_refused_before_work_begins(reader: str) -> None:
    run = run_forks.recipe()
    mood = LowValue(Estimated("mood"), budget=1)

    @dataclass(frozen=True)
    class Moody(GroupMean):
        needs: ClassVar[tuple[str, ...]] = ("mood",)

    @dataclass(frozen=True)
    class Steps(StepStarts):
        needs: ClassVar[tuple[str, ...]] = ("mood",)

    made, name = {
        "pruning": (replace(run, pruning=(mood,)), "LowValue"),
        "advantage": (replace(run, mix=Mix((Term(Estimator(Clip(), Behavior(), Moody())),))), "Moody"),
        "signal": (replace(run, signals=(Steps(),)), "Steps"),
    }[reader]
    with pytest.raises(ValueError, match=rf"{name} needs the signal 'mood', which nothing provides \(.*ForwardInfluence provides influence"):
        check_signals(made)


@dataclass(frozen=True)
class MoodyPart:
    """Any part, as far as its needs are concerned."""

    features: frozenset[str] = frozenset()
    needs: ClassVar[tuple[str, ...]] = ("mood",)

    def __call__(self, *_: Any) -> Any: ...

    def expand(self, *_: Any) -> Any: ...


class MoodyRule:
    """One that is no dataclass."""

    needs = ("mood",)

    def __call__(self, tree: Tree) -> list[Node]:
        return []


MOODY = MoodyPart()


def term(**parts: Any) -> Mix:
    return Mix((Term(Estimator(**{"mask": Clip(), "reference": Behavior(), "advantage": GroupMean()} | parts)),))


@pytest.mark.parametrize("parts", [
    {"mix": replace(term(), gate=MOODY)}, {"mix": term(mask=MOODY)}, {"mix": term(mask=Product((Clip(), PerAuthor(MOODY, Clip()))))},
    {"mix": term(reference=MOODY)}, {"mix": term(leaf=MOODY)}, {"mix": term(advantage=MOODY)},
    {"temperature": MoodyPart(frozenset({"stats"}))},
    {"branching": Segments(4, 2, 4, fallback=MOODY)}, {"branching": Segments(4, 2, 4, seeds=MOODY)},
    {"branching": Segments(4, 2, 4, allocation=MOODY)},
    {"branching": Hinted(Hinted(Segments(4, 2, 4, fallback=MOODY)))}, {"pruning": (LowValue(MOODY, budget=1),)}, {"pruning": (MoodyRule(),)},
])  # fmt: skip
def test_every_part_that_reads_trees_is_served_or_refused(parts: dict[str, Any]) -> None:
    @dataclass(frozen=True)
    class Mood(Depth):
        provides: ClassVar[tuple[str, ...]] = ("mood",)

    run = replace(run_forks.recipe(), **parts)
    with pytest.raises(ValueError, match=r"needs the signal 'mood', which nothing provides \("):
        check_signals(run)
    check_signals(replace(run, signals=(*run.signals, Mood())))
    lists = run.mix.needs, needed(run.branching), needed(*run.pruning), needed(run.temperature)
    assert [names for names in lists if "mood" in names] == [("mood",)]


def test_a_first_round_is_chosen_before_there_is_any_signal() -> None:
    with pytest.raises(ValueError, match=r"MoodyPart\(.*\) needs the signal 'mood', but the first round is chosen before anything is sampled"):
        Segments(4, 2, 4, first=MOODY)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["rewards", "tasks", "temperature", "answer", "learner", "engine"])
def test_a_part_that_is_shown_no_tree_cannot_need_a_signal(place: str) -> None:
    run = replace(run_forks.recipe(), **{place: MOODY})
    with pytest.raises(ValueError, match=rf"MoodyPart needs the signal 'mood', but nothing shows {place} a tree to read it in: only branching, "):
        check_signals(run)


def test_the_value_head_is_missed_whoever_reads_it() -> None:
    @dataclass(frozen=True)
    class Sure(MoodyPart):
        needs: ClassVar[tuple[str, ...]] = ("value",)

    with pytest.raises(ValueError, match="Sure needs the signal 'value', but the run trains no value head: give the mix one"):
        check_signals(replace(run_forks.recipe(), mix=replace(term(), gate=Sure())))


def test_the_gate_is_served_in_all_trees_the_others_in_those_that_are_kept() -> None:
    @dataclass(frozen=True)
    class Deep(MoodyPart):
        needs: ClassVar[tuple[str, ...]] = ("depth",)

    @dataclass(frozen=True)
    class Steps(MoodyPart):
        needs: ClassVar[tuple[str, ...]] = ("depth", "steps")

    trees = [Tree.plant(Task(name, (0,), name)) for name in "ab"]
    leaves = [tree.add(tree.root, [0, 1], Author.POLICY, finish="eos") for tree in trees]
    signals = Signals(provided((Depth(),)), SignalContext(None, Vocabulary()))  # type: ignore[arg-type]
    asyncio.run(signals.before_update(replace(term(mask=Steps()), gate=Deep()), trees, trees[:1]))
    assert [leaf.signals.keys() for leaf in leaves] == [{"depth", "steps"}, {"depth"}]


def test_a_rule_and_a_schedule_say_what_they_read() -> None:
    class Bare:
        needs = ()

        def __call__(self, *_: Any) -> tuple[()]:
            return ()

    with pytest.raises(ValueError, match="Bare has no 'rounds': write rounds: ClassVar = None"):
        check_signals(replace(run_forks.recipe(), branching=Bare()))
    with pytest.raises(ValueError, match="Bare has no 'expand': write expand: ClassVar = None"):
        check_signals(replace(run_forks.recipe(), schedule=Bare()))


def test_a_pruning_rule_is_served_by_a_signal_of_the_recipe() -> None:
    run = replace(run_forks.recipe(), branching=Segments(4, 2, 4), pruning=(LowValue(Estimated("depth"), budget=1),), signals=(Depth(),))
    check_signals(run)


def test_an_option_that_moved_is_found_where_it_is_now(tmp_path: Path) -> None:
    (run,) = override((run_forks.recipe(),), ["signals.0.delta=3"])
    assert run.signals == (ForwardInfluence(delta=3),)
    with pytest.raises(ValueError, match=r"branching.delta: AttentionForks has no field 'delta' any more, it is signals.0.delta"):
        override((run,), ["branching.delta=3"])
    with pytest.raises(ValueError, match=r"branching.words: EntropyForks has no field 'words' any more, it is signals.0.words"):
        override((run_forks.entropy(),), ["branching.words=a,b"])
    saved = tmp_path / "run.json"
    saved.write_text('{"format": 1, "recipe": "attnrl:small", "overrides": ["branching.delta=2", "steps=3"], "stages": []}')
    assert read_saved(saved)["overrides"] == ["signals.0.delta=2", "steps=3"]
