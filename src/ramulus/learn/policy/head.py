"""From hidden states to log-probs, a chunk of targets at a time, so that no T x V logits ever exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ramulus.learn.policy.half_head import Read
from ramulus.learn.policy.half_kernels import WHOLE_VECTORS, HeadPanels
from ramulus.learn.policy.narrow import Narrow

SMALL = 2**23  # logits that may be kept for the backward pass; above it each chunk is computed again there


@dataclass(frozen=True)
class Head:
    """The output layer of a causal LM and what its model does to the logits."""

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    chunk: int = 1024  # targets whose logits exist at once
    drawn: int | None = None  # the ids below it share the probability; None: all that the layer has
    narrow: Narrow | None = None  # copies of weights in bfloat16, for hidden states that come in it; None computes as the layer does

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, V], float32 or float64."""
        logits = self.linear(hidden)[..., : self.drawn]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def __call__(
        self, hidden: Tensor, token: Tensor, temperature: Tensor | None, entropy_grad: bool, hot: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [N, d] that predict token [N] -> tempered, plain, entropy [N]; tempered is plain where `temperature` is None.

        The entropy is that of the plain distribution, or with `hot` of the tempered one.
        """
        if self.narrow is not None and hidden.dtype == torch.bfloat16 and self.softcap is None and is_plain(self.linear):
            return self._half(self.narrow, hidden, token, temperature, entropy_grad, hot)
        parts = []
        for at in range(0, len(token), self.chunk):
            part = slice(at, at + self.chunk)
            arguments = (hidden[part], token[part], None if temperature is None else temperature[part], entropy_grad, hot)
            if torch.is_grad_enabled() and len(token) * self._width() > SMALL:
                parts.append(checkpoint(self._some, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._some(*arguments))
        tempered, plain, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        return plain if temperature is None else tempered, plain, entropy

    def _half(
        self, narrow: Narrow, hidden: Tensor, token: Tensor, temperature: Tensor | None, entropy_grad: bool, hot: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`__call__` with float32 logits of bfloat16 weights, by kernels."""
        weight: Any = self.linear.weight
        words = len(weight) if self.drawn is None else min(self.drawn, len(weight))
        copy = narrow.stacked(weight)
        panels = narrow.kept([weight], lambda: HeadPanels.of(copy, words), f"panels {words}")
        by = None if temperature is None else temperature.float().reciprocal()
        tempered, plain, entropy = Read.apply(hidden, weight, copy, panels, self.scale, token, by, hot)  # type: ignore[no-untyped-call]
        return plain if by is None else tempered, plain, entropy if entropy_grad else entropy.detach()

    @contextmanager
    def stopped(self) -> Iterator[list[Tensor]]:
        """Inside, the model's output layer keeps what it is given, in the list, instead of computing logits."""
        states: list[Tensor] = []

        def keep(hidden: Tensor, *unused: Any) -> Tensor:
            states.append(hidden)
            return hidden[..., :1]

        linear: Any = self.linear
        linear.forward = keep
        try:
            yield states
        finally:
            del linear.forward

    def _width(self) -> int:
        return int(getattr(self.linear, "out_features", 0) or next(self.linear.parameters()).shape[0])

    def _some(
        self, hidden: Tensor, token: Tensor, temperature: Tensor | None, entropy_grad: bool, hot: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(hidden)
        every = logits.log_softmax(-1)
        plain = every.gather(1, token[:, None])[:, 0]
        tempered = plain
        if temperature is not None:
            divisor = temperature[:, None].to(logits.dtype)
            warm = (logits / divisor).log_softmax(-1)
            tempered = warm.gather(1, token[:, None])[:, 0]
            every = warm if hot else every
        known = every if entropy_grad else every.detach()
        return tempered, plain, -(known.exp() * known).sum(-1)


def is_plain(linear: Any) -> bool:
    """Whether an output layer is a product that the kernels compute."""
    return type(linear) is nn.Linear and linear.bias is None and linear.in_features % WHOLE_VECTORS == 0 and linear.weight.device.type == "cpu"


def head_of(model: Any, chunk: int) -> Head:
    """The head of a transformers causal LM, with the scaling and capping that its config names.

    Raises ValueError for a model without an output layer.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise ValueError(
            f"{type(model).__name__} has no output layer to read log-probs from: it is no causal language model, so take another one"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None), chunk, getattr(model, "ramulus_tokens", None))
