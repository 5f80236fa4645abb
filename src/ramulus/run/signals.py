"""Signals: numbers of every token that parts of a recipe read, each computed by an object of the recipe or a shipped one."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from inspect import isawaitable
from typing import Any, ClassVar, Protocol

from ramulus.core.recipe_part import needed
from ramulus.core.tree import Tree
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.scoring import score
from ramulus.learn.policy.steps import Marked, Separators, holding, marked_after, marked_steps, separators_of

THINK_END = "</think>"


@dataclass
class SignalContext:
    """What a signal may ask for: words of the vocabulary, and forward passes of the weights that are being trained.

    Example:
        >>> import inspect
        >>> from ramulus import SignalContext
        >>> inspect.iscoroutinefunction(SignalContext.score)  # a forward pass of the learner is awaited
        True
    """

    learner: Learner
    tokenizer: Any
    columns: Collection[str] = ()  # that the step's Mix reads
    known: dict[tuple[str, ...], frozenset[int]] = field(default_factory=dict)
    quiet: Callable[[], AbstractAsyncContextManager[None]] = nullcontext  # keeps an engine that reads these weights from sampling meanwhile

    @property
    def rides(self) -> tuple[str, ...]:
        """The columns that every pass of these weights may as well write, as scoring then passes only the paths that grew later.

        A Mix that reads "recomputed" refuses to look ahead, so that the weights are the same. Behind `Behavior`, as in the recipes
        attnrl and ramulus, no such pass is needed ("reference_model" is one of other weights), and influence takes one of its own, without the head.
        """
        return tuple(sorted({"recomputed", "recomputed_tempered"} & set(self.columns)))

    @cached_property
    def separators(self) -> Separators:
        """The tokenizer's separators, with its token that ends the thinking, if it has one."""
        end = self.tokenizer.get_vocab().get(THINK_END)
        return separators_of(self.tokenizer.batch_decode, len(self.tokenizer), end)

    def holding(self, words: Sequence[str]) -> frozenset[int]:
        """The tokens of the vocabulary whose text holds one of the words, in any case of letters."""
        key = tuple(words)
        if key not in self.known:
            self.known[key] = holding(self.tokenizer.batch_decode, len(self.tokenizer), words)
        return self.known[key]

    async def score(self, trees: Sequence[Tree], columns: Collection[str], influence: Influence | None = None) -> None:
        """Write columns of the learner, and influence, into the signals of every learned node."""
        async with self.quiet() if "in_place" in self.learner.features else nullcontext():
            await score(self.learner, trees, columns, influence)


class Signal(Protocol):
    """Computes the signals it `provides`, from others that it `needs`, for trees between two rounds: a frozen dataclass, pure.

    Answers (node, name, one number for each of its tokens), of whichever nodes it has something to say; what the learner scores is
    written by `SignalContext.score`. It may be async. The same trees in the same order must give the same numbers.

    Example:
        >>> from ramulus import AttentionForks, ForwardInfluence, Signal
        >>> signal: Signal = ForwardInfluence(delta=4)
        >>> signal.provides, AttentionForks(roots=2).needs
        (('influence',), ('steps', 'influence'))
    """

    @property
    def provides(self) -> tuple[str, ...]: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterable[Marked] | Awaitable[Iterable[Marked]]: ...


@dataclass(frozen=True)
class StepStarts:
    """The signal "steps": 1 where a step of some path begins, by the empty lines of each response, else its lines (arXiv 2509.26628).

    Example:
        >>> from ramulus import StepStarts
        >>> StepStarts().provides
        ('steps',)
    """

    provides: ClassVar[tuple[str, ...]] = ("steps",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterable[Marked]:
        return (column for tree in trees for column in marked_steps(tree, context.separators))


@dataclass(frozen=True)
class Concluded:
    """The signal "concluded": 1 after the first token of a path whose text holds one of the words (as TreeRL's released code, arXiv 2506.11902).

    Example:
        >>> from ramulus import Concluded
        >>> Concluded(words=("answer",)).provides
        ('concluded',)
    """

    words: tuple[str, ...] = ("conclusion", "answer")

    provides: ClassVar[tuple[str, ...]] = ("concluded",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterable[Marked]:
        words = context.holding(self.words)
        return (column for tree in trees for column in marked_after(tree, words))


@dataclass(frozen=True)
class ForwardInfluence:
    """The signal "influence": forward context influence of each token's step (arXiv 2509.26628, eqs. 4-6), the mean over the paths that share it.

    A step attends to those at least `delta` before it; steps are those of StepStarts. Takes a forward pass, or rides on one that scores.

    Example:
        >>> from ramulus import ForwardInfluence
        >>> ForwardInfluence(delta=4).provides
        ('influence',)
    """

    delta: int = 4

    provides: ClassVar[tuple[str, ...]] = ("influence",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.delta < 1:
            raise ValueError(f"ForwardInfluence's delta is a number of steps, at least 1, got {self.delta}")

    async def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterable[Marked]:
        await context.score(trees, context.rides, Influence(context.separators, self.delta))
        return ()


@dataclass(frozen=True)
class StateValue:
    """The signal "value": what the value head says of the state before each token; takes a forward pass, and a Mix with `value` above 0.

    Example:
        >>> from ramulus import StateValue
        >>> StateValue().provides
        ('value',)
    """

    provides: ClassVar[tuple[str, ...]] = ("value",)
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterable[Marked]:
        await context.score(trees, self.provides)
        return ()


SHIPPED: tuple[Signal, ...] = (StepStarts(), ForwardInfluence(), Concluded(), StateValue())
"""What provides the names that nothing in a recipe does."""


@dataclass(frozen=True)
class Signals:
    """Supplies names of signals to trees by a recipe's objects; the order of work follows what each of them needs."""

    providers: Mapping[str, Signal]
    context: SignalContext

    async def __call__(self, trees: Sequence[Tree], names: Iterable[str]) -> None:
        """Write these signals, and those that they are computed from. ValueError for a column that is not one number for each token."""
        for provider in ordered(self.providers, names) if trees else ():
            columns = provider(trees, self.context)
            for node, name, values in await columns if isawaitable(columns) else columns:
                if name not in provider.provides or len(values) != len(node.tokens):
                    raise ValueError(
                        f"{provider} wrote {len(values)} numbers of {name!r} for a node of {len(node.tokens)} tokens: "
                        f"a signal is one number for each, of a name it provides ({', '.join(provider.provides)})"
                    )
                node.signals[name] = values if isinstance(values, array) else array("d", values)

    async def before_update(self, mix: Mix, grown: Sequence[Tree], kept: Sequence[Tree]) -> None:
        """Write what the parts of a Mix read in graded trees: its gate in all that were grown, the others in those that are kept and scored."""
        gate, scored = needed(mix.gate), {id(tree) for tree in kept}
        await self(grown, [name for name in gate if name not in mix.columns])
        await self([tree for tree in grown if id(tree) not in scored], [name for name in gate if name in mix.columns])
        await self(kept, [name for name in mix.needs if name not in gate and name not in mix.columns])


def provided(signals: Sequence[Signal]) -> dict[str, Signal]:
    """Who provides each name: the objects of a recipe, and the shipped ones for what those leave out. ValueError for two of one name."""
    providers: dict[str, Signal] = {}
    for signal in signals:
        for name in signal.provides:
            if name in providers:
                raise ValueError(f"{providers[name]} and {signal} both provide the signal {name!r}: leave one of them out of signals")
            providers[name] = signal
    return {name: signal for signal in SHIPPED for name in signal.provides} | providers


def ordered(providers: Mapping[str, Signal], names: Iterable[str], reader: str = "a rule") -> list[Signal]:
    """Who is to work for these names, in order: what a provider needs comes before it. ValueError for a name of nobody, or a circle."""
    order: list[Signal] = []

    def visit(name: str, reader: str, above: tuple[str, ...]) -> None:
        if name not in providers:
            known = ", ".join(f"{type(signal).__name__} provides {name}" for name, signal in providers.items())
            raise ValueError(
                f"{reader} needs the signal {name!r}, which nothing provides ({known}): give signals=(...,) an object that does, see docs/extend.md"
            )
        if name in above:
            raise ValueError(f"signals need each other in a circle: {' from '.join((*above, name))}")
        provider = providers[name]
        for below in needed(provider):
            visit(below, type(provider).__name__, (*above, name))
        if provider not in order:
            order.append(provider)

    for name in names:
        visit(name, reader, ())
    return order
