"""Estimates of how far the policy has left its reference model, from the tokens that were sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = {"k1": "k1", "kl": "k1", "abs": "abs", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3"}  # verl's, slime's and OpenRLHF's


@dataclass(frozen=True)
class KL:
    """What the KL term of a Mix says of a token, from x = log reference - log pi (http://joschu.net/blog/kl-approx.html).

    `k1` ("kl") is -x, `abs` |x|, `k2` ("mse") x^2 / 2, `k3` ("low_var_kl") e^x - 1 - x. A value is held in [-clamp, clamp], and where that acts the
    gradient is 0: k3 lets go of the very tokens that have left the reference model furthest. With a "+" (`k1+`, `abs+`, `k3+`) the value is the
    same and the gradient that of k2, -x, which neither stops nor explodes, and which is that of KL(pi || reference) in expectation.

    verl: "low_var_kl" and "k3+" with the clamp, the others with `clamp=None`. slime: `KL("k3", clamp=None)`, "low_var_kl" with it. OpenRLHF: all
    with it. TRL: `KL("k3", clamp=None)`. Their log-probs are divided by the sampling temperature first: `tempered=True`; False takes both models
    as they are.

    Example:
        >>> import torch
        >>> from ramulus import KL
        >>> logp = torch.tensor([-1.0, -16.0], requires_grad=True)
        >>> value = KL()(logp, torch.tensor([-1.0, -1.0]))
        >>> value.sum().backward()
        >>> float(value.detach()[1]), float(logp.grad[1])  # the second token has drifted by 15
        (10.0, -15.0)
    """

    estimator: str = "k3+"
    clamp: float | None = 10.0
    tempered: bool = False

    def __post_init__(self) -> None:
        base, plus = self.estimator.removesuffix("+"), self.estimator.endswith("+")
        if base not in NAMES or (plus and NAMES[base] == "k2"):
            raise ValueError(
                f"KL's estimator is one of {', '.join(NAMES)}, or k1+, abs+, k3+ with the gradient of k2; got {self.estimator!r}"
            )
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"KL's clamp must be above 0, or None for none, got {self.clamp}")

    def __call__(self, logp: Tensor, reference: Tensor) -> Tensor:
        """Log-probs [T] of the policy and of the reference model -> the estimate [T], differentiable in the first."""
        x = (reference - logp).detach()
        value, slope = self.of(x)
        if self.clamp is not None:
            slope = slope.masked_fill(value.abs() > self.clamp, 0.0)
            value = value.clamp(-self.clamp, self.clamp)
        if self.estimator.endswith("+"):
            slope = -x
        return value + slope * (logp - logp.detach())

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T] -> the value without a clamp, and its slope in log pi [T]."""
        kind = NAMES[self.estimator.removesuffix("+")]
        if kind == "k1":
            return -x, torch.ones_like(x)
        if kind == "abs":
            return x.abs(), -x.sign()
        if kind == "k2":
            return x**2 / 2, -x
        grown = x.clamp(max=80).exp()  # float32 ends at e^88
        return grown - 1 - x, 1 - grown
