"""KL-Cov as terms of the formula: a policy gradient without a clip, and a pull on the few tokens that cost the most entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ramulus.learn.advantage.entropy_advantage import Covarying
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Behind, Everything
from ramulus.learn.objective.mix import Normaliser, Term
from ramulus.learn.objective.reference import Behavior, Itself


def kl_cov(
    advantage: Any = None,
    share: float = 2e-4,
    coef: float = 1.0,
    normaliser: Normaliser | None = None,
    chosen_by: str = "behavior",
) -> tuple[Term, ...]:
    """The three terms of -A r + coef |log r| on the chosen tokens (arXiv 2505.22617): Mix(kl_cov()).

    |log r| has the slope -1 where the policy lies below the old one and +1 above: credit +1 under a mask that acts below, credit -1 under one
    that acts above. A KL term or entropy bonus beside them wants a normaliser of its own, Mix(..., normaliser=TokenMean()). `chosen_by` is the
    column by which `Covarying` chooses; "recomputed_tempered" is what verl sees at the first update of a step.
    """
    rule = GroupMean() if advantage is None else advantage
    pull = Term(Estimator(Behind(), Itself(), Covarying(rule, share, 1.0, chosen_by)), normaliser=normaliser, coefficient=coef)
    back = replace(pull, estimator=replace(pull.estimator, advantage=Covarying(rule, share, -1.0, chosen_by)))
    return Term(Estimator(Everything(), Behavior(), rule), normaliser=normaliser), pull, back
