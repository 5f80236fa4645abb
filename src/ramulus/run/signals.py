"""What branching rules and schedules read of growing trees: computed by the policy, all trees of a round at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ramulus.core.tree import Tree
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.steps import Separators, holding, mark_concluded, mark_steps, separators_of
from ramulus.learn.policy.torch_policy import TorchPolicy

KNOWN = ("steps", "influence", "concluded", "value")
THINK_END = "</think>"


@dataclass
class Signals:
    """Writes the signals that are asked for into every node on a policy path; the same trees in the same order give the same numbers.

    Influence takes a forward pass. Where `columns`, those of the step's Mix, hold "recomputed", that pass gives these as well, so that
    scoring need only pass the paths that grew later: the weights are the same, as such a Mix refuses to look ahead. Behind `Behavior`,
    as in the recipes attnrl and ramulus, no pass of these weights is needed before branching ("frozen" is one of other weights), and
    influence takes one of its own, without the head.
    """

    policy: TorchPolicy
    tokenizer: Any
    columns: Collection[str] = ()
    found: dict[tuple[str, ...], frozenset[int]] = field(default_factory=dict)

    @property
    def rides(self) -> tuple[str, ...]:
        """The columns that are written in the pass for influence, for scoring to keep."""
        return tuple({"recomputed"} & set(self.columns))

    @cached_property
    def separators(self) -> Separators:
        """Those of the tokenizer, with its token that ends the thinking, if it has one."""
        found = self.tokenizer.get_vocab().get(THINK_END)
        return separators_of(self.tokenizer.batch_decode, len(self.tokenizer), found)

    def words(self, words: Sequence[str]) -> frozenset[int]:
        """The tokens of the vocabulary that hold one of the words."""
        key = tuple(words)
        if key not in self.found:
            self.found[key] = holding(self.tokenizer.batch_decode, len(self.tokenizer), words)
        return self.found[key]

    def __call__(self, trees: Sequence[Tree], names: Collection[str], rule: Any) -> None:
        """Supply the signals `names`; their options are fields of the `rule` that grows the trees. ValueError for an unknown one."""
        if unknown := sorted(set(names) - set(KNOWN)):
            raise ValueError(f"unknown signals {', '.join(unknown)}: this version computes {', '.join(KNOWN)}")
        for tree in trees:
            if "steps" in names:
                mark_steps(tree, self.separators)
            if "concluded" in names:
                mark_concluded(tree, self.words(rule.words))
        if "value" in names:
            self.policy.score(trees, ("value",))
        if "influence" in names:
            self.policy.score(trees, self.rides, Influence(self.separators, getattr(rule, "delta", 4)))


def needed(*rules: Any) -> tuple[str, ...]:
    """The signals that some rule reads."""
    return tuple(dict.fromkeys(name for rule in rules for name in getattr(rule, "needs", ())))
