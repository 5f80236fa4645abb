"""Mix: a sum of terms of the one formula, and the three things that are not advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ramulus.core.recipe_part import inside, needed, with_defaults
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.group import Advantage
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Gate, GateWeights
from ramulus.learn.objective.kl import KL
from ramulus.learn.objective.mask import Mask
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Reference
from ramulus.learn.objective.token_weight import Product

Leaves = Sequence[
    Sequence[tuple[int, float]]
]  # per tree and trained leaf: (learned tokens, share); shares of a tree sum to its leaves
Normaliser = Callable[[Leaves], list[list[float]]]
"""The trained leaves of a whole optimizer step -> what each token of each leaf weighs."""


@dataclass(frozen=True)
class TokenMean:
    """Every trained token of the optimizer step weighs the same (DAPO, arXiv 2503.14476, eq. 8).

    Example:
        >>> from ramulus import TokenMean
        >>> TokenMean()([[(2, 1.0), (2, 1.0)]])
        [[0.25, 0.25]]
    """

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(n * share for tree in leaves for n, share in tree)
        return [[share / total for _, share in tree] for tree in leaves]


@dataclass(frozen=True)
class SequenceMean:
    """Every leaf weighs the same, spread over its tokens (GRPO, arXiv 2402.03300, eq. 3).

    Example:
        >>> from ramulus import SequenceMean
        >>> SequenceMean()([[(2, 1.0), (4, 1.0)]])
        [[0.25, 0.125]]
    """

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(share for tree in leaves for _, share in tree)
        return [[share / total / n for n, share in tree] for tree in leaves]


@dataclass(frozen=True)
class ConstantLength:
    """Every leaf's token sum over one fixed length (Dr.GRPO, arXiv 2503.20783, section 3.2).

    Example:
        >>> from ramulus import ConstantLength
        >>> ConstantLength(10)([[(2, 1.0), (4, 1.0)]])
        [[0.05, 0.05]]
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"ConstantLength needs a length of at least 1 token, got {self.length}")

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(share for tree in leaves for _, share in tree)
        return [[share / total / self.length for _, share in tree] for tree in leaves]


@dataclass(frozen=True)
class QuestionMean:
    """Every question of the step weighs 1/Q, its leaves alike, each spread over its tokens.

    Example:
        >>> from ramulus import QuestionMean
        >>> QuestionMean()([[(2, 1.0), (2, 1.0)], [(4, 1.0)]])  # two questions, the second with one path of four tokens
        [[0.125, 0.125], [0.125]]
    """

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        return [[share / (len(tree) * len(leaves) * n) for n, share in tree] for tree in leaves]


@dataclass(frozen=True)
class Term:
    """One estimator on the tokens of some authors.

    `side` says whose weight of the Mix's gate its leaves take: None for that of each leaf's author, or a name that the gate gives.

    Example:
        >>> from ramulus import Author, Constant, Estimator, Everything, Itself, Term
        >>> sft = Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,))
        >>> sft.coefficient
        1.0
    """

    estimator: Estimator
    authors: tuple[Author, ...] = (Author.POLICY,)
    normaliser: Normaliser | None = None  # None: TokenMean, and QuestionMean in a Mix with a gate
    coefficient: float = 1.0
    side: Author | str | None = None

    def __post_init__(self) -> None:
        wrong = [author for author in self.authors if author not in (Author.POLICY, Author.EXPERT)]
        if wrong or not self.authors:
            raise ValueError(f"a term learns from POLICY or EXPERT tokens, got {self.authors}")


@dataclass(frozen=True)
class Mix:
    """A sum of terms, a KL term to a reference model and an entropy bonus.

    A gate multiplies what each leaf weighs after the normaliser has spoken, so that a question weighs the same whichever way it goes.

    KL term and bonus weigh each token by the sum of the terms' weights there, or by a `normaliser` of their own over all trained leaves (times
    what the gate says of them): TokenMean() is the masked mean that verl and its forks take of both, whatever the loss is averaged by. `share`
    says how a tree's leaves share its weight: all alike, or split equally at each fork.

    Example:
        >>> from ramulus import Behavior, Clip, Estimator, GroupMean, Mix, Term
        >>> mix = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
        >>> mix.terms[0].normaliser
        TokenMean()
    """

    terms: tuple[Term, ...]
    kl_coef: float = 0.0  # coefficient of KL(pi || reference model)
    kl: KL = field(default_factory=KL)  # by which estimate, at which temperature
    entropy_bonus: float = 0.0
    entropy_tempered: bool = False  # whether the policy's entropy is that at the temperature of sampling, as in verl and TRL, or at 1
    normaliser: Normaliser | None = None  # of the KL term and the bonus; None: the terms' own
    share: Literal["each_leaf", "each_fork"] = "each_leaf"
    gate: Gate | None = None  # from whom each question is learned; None takes every leaf as it is
    value: float = 0.0  # coefficient of the value head's regression (PPO)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a Mix needs at least one term")
        usual = TokenMean() if self.gate is None else QuestionMean()
        terms = (t if t.normaliser is not None else replace(t, normaliser=usual) for t in self.terms)
        object.__setattr__(self, "terms", tuple(terms))
        if self.gate is None and any(term.side is not None for term in self.terms):
            raise ValueError(
                "a term's side is a weight of the Mix's gate, but the Mix has none: give it gate=Switch(), say, or leave side out"
            )
        valued = "value" in needed(*(term.estimator.advantage for term in self.terms))
        if not (math.isfinite(self.value) and (self.value > 0 if valued else self.value == 0)):
            raise ValueError(
                f"value is the coefficient of a value head: above 0 with an advantage such as GAE, else 0; got {self.value}"
            )
        if not (math.isfinite(self.kl_coef) and self.kl_coef >= 0 and math.isfinite(self.entropy_bonus)):
            raise ValueError(
                f"kl_coef must be a finite number of at least 0 and entropy_bonus finite, got {self.kl_coef} and {self.entropy_bonus}"
            )
        if self.entropy_tempered and (untempered := [part for term in self.terms for part in signals_of(term.estimator.mask)]):
            raise ValueError(
                f"entropy_tempered makes the policy's entropy that at the temperature of sampling, but {untempered[0]} holds it against untempered "
                "ones, as sampled: leave one of the two out"
            )
        if self.share not in ("each_leaf", "each_fork"):
            raise ValueError(f"share is 'each_leaf' or 'each_fork', got {self.share!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals that some part reads: the gate in every graded tree, the others in those that are learned from."""
        return needed(*(value for _, value in inside(self)))

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that some part reads."""
        named = {column for term in self.terms for column in term.estimator.scored}
        reference = {"reference_model_tempered" if self.kl.tempered else "reference_model"} if self.kl_coef else set()
        return named | reference | ({"value"} if self.value else set())

    @property
    def begins(self) -> set[str]:
        """Those that the first forward pass of an update gives, if the step has no other update: nobody reads them before it."""
        early = {with_defaults(term.estimator.advantage, Advantage).column for term in self.terms} | set(self.needs)
        return self.columns & {"recomputed", "recomputed_tempered"} - early

    @property
    def tempered(self) -> bool:
        """Whether some part reads log-probs at the temperature of sampling, which greedy text has none at."""
        extras = (self.kl_coef and self.kl.tempered) or (self.entropy_bonus and self.entropy_tempered)
        return bool(extras) or any(term.estimator.tempered for term in self.terms)

    def credit(self, forest: Sequence[Tree]) -> list[list[Credits]]:
        """Every term's credits for the whole forest, term by term, tree by tree.

        Raises ValueError where a leaf weight meets credit that differs along a path: it weighs a path as one.
        """
        answers: list[list[Credits]] = [term.estimator.advantage(forest) for term in self.terms]
        for term, answer in zip(self.terms, answers, strict=True):
            if term.estimator.leaf is not None and any(c.token is not None or c.node is not None for c in answer):
                raise ValueError(
                    f"{term.estimator.leaf} weighs each path as one, but {term.estimator.advantage} credits tokens or nodes: "
                    "take an advantage with one value a leaf, or leave leaf out"
                )
        return answers

    def gates(self, forest: Sequence[Tree], state: dict[str, Any]) -> tuple[list[GateWeights] | None, dict[str, Any]]:
        """What the gate says of every tree, in order, and its state afterwards; None without a gate."""
        if self.gate is None:
            return None, state
        answers = []
        for tree in forest:
            weights, state = self.gate(tree, state)
            answers.append(weights)
        return answers, state

    def measure(self, forest: Sequence[Tree], trained: Sequence[Sequence[Collection[int]]]) -> dict[str, float]:
        """Numbers of the whole step for masks and references that ask for some, as `TERM/NAME`; for `TreeBatch.stats`.

        `trained` gives the ids of the leaves that each term trains, per tree: `Selection.terms`, of all minibatches, so that no result
        depends on the cutting.
        """
        stats: dict[str, float] = {}
        for m, (term, leaves) in enumerate(zip(self.terms, trained, strict=True)):
            asked = with_defaults(term.estimator.mask, Mask).measure, with_defaults(term.estimator.reference, Reference).measure
            stats |= {f"{m}/{name}": value for measure in asked if measure is not None for name, value in measure(forest, leaves).items()}
        return stats

    def loss(
        self, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch, value: Tensor | None = None
    ) -> Tensor:
        """A scalar whose gradient is the estimate; its value is not the textbook loss (`gauges.surrogate` gives that).

        `tempered` and `plain` are log-probs [T] at the sampling temperature and at 1, `entropy` [T] is at the one that `entropy_tempered` says,
        `value` [T] is what a value head says.
        """
        total, batch = plain.new_zeros(()), batch.begun(tempered, plain)
        for m, term in enumerate(self.terms):
            logp = tempered if term.estimator.tempered else plain
            coefficient = term.estimator.coefficient(logp.detach(), entropy.detach(), self.term(batch, m))
            total = total - term.coefficient * (coefficient * logp).sum()
        return total + self.extras(tempered if self.kl.tempered else plain, entropy, batch, value)

    def term(self, batch: TreeBatch, m: int) -> TreeBatch:
        """What the estimator of term m sees of a batch."""
        return self.terms[m].estimator.sees(batch.term(m))

    def extras(self, logp: Tensor, entropy: Tensor, batch: TreeBatch, value: Tensor | None = None) -> Tensor:
        """The additive terms that are no advantages: the KL term, entropy bonus and, where values are given, their regression.

        `logp` [T] is at the temperature that `kl` says.
        """
        total = logp.new_zeros(())
        weight = batch.weight.sum(0) if batch.extra_weight is None else batch.extra_weight
        if self.kl_coef:
            name = "reference_model_tempered" if self.kl.tempered else "reference_model"
            reference = getattr(batch, name)
            if reference is None:
                raise ValueError(
                    f"the KL term needs the log-probs of the reference model: score the forest for {name!r} before packing"
                )
            total = total + self.kl_coef * (weight * self.kl(logp, reference)).sum()
        if self.entropy_bonus:
            total = total - self.entropy_bonus * (weight * entropy).sum()
        if self.value and value is not None:
            total = total + self.value * regression(value, batch)
        return total


def signals_of(mask: Any) -> list[Any]:
    """The parts of a mask that hold the policy's entropy now against quantiles of entropies as sampled."""
    if isinstance(mask, Product | PerAuthor):
        return [signal for part in (mask.parts if isinstance(mask, Product) else (mask.policy, mask.expert)) for signal in signals_of(part)]
    return [mask] if with_defaults(mask, Mask).signal is not None else []


def regression(value: Tensor, batch: TreeBatch) -> Tensor:
    """Half the weighted squared error of values [T] to each path's targets, as PPO sums it over flattened paths (arXiv 1707.06347, eq. 9).

    The paths below a shared token have one mean target there and a spread around it, which no gradient sees.
    """
    assert batch.target is not None
    assert batch.target_weight is not None
    assert batch.target_spread is not None
    return 0.5 * (batch.target_weight * ((value - batch.target) ** 2 + batch.target_spread)).sum()
