"""A policy that also says what a state is worth: PPO's critic, a head on the same trunk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.policy.torch_policy import TorchPolicy

SPEED = 10.0  # the head starts from nothing, the trunk from a trained model


class ActorCritic(TorchPolicy):
    """A policy with a value head on its trunk: V(state) is linear in the hidden state that predicts the next token.

    The head starts at 0, learns at SPEED times the policy's rate, and is kept in checkpoints but not in the model's folder. Takes what
    TorchPolicy takes.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        size = model.get_input_embeddings().weight.shape[1]
        self.critic = nn.Linear(size, 1, device=self.device, dtype=self.dtype)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        self.seen: Tensor | None = None  # hidden states of the last row [T, d]
        self.trainable |= {f"critic/{name}": p for name, p in self.critic.named_parameters()}
        group = {"params": list(self.critic.parameters()), "weight_decay": 0.0, "speed": SPEED}
        self.optimizer.add_param_group(group)

    def _hidden(self, model: Any, *row: Any) -> Tensor:
        """As TorchPolicy's, remembered."""
        hidden = super()._hidden(model, *row)
        if model is self.model:
            self.seen = hidden
        return hidden

    def value(self, batch: TreeBatch) -> Tensor | None:
        """The value of the state before each token [T], from the hidden states of the row that was just evaluated."""
        assert self.seen is not None
        return self.read(batch.parent.to(self.device))

    def read(self, parent: Tensor) -> Tensor:
        """parent [T] -> values [T], in at least float32."""
        assert self.seen is not None
        values: Tensor = self.critic(self.seen[parent].to(self.dtype))[:, 0]
        return values if values.dtype == torch.float64 else values.float()

    @torch.no_grad()
    def score(self, forest: Sequence[Tree], columns: Collection[str], *more: Any, **options: Any) -> None:
        """As TorchPolicy's; "value" is a forward pass of its own."""
        super().score(forest, columns, *more, **options)
        if "value" not in columns:
            return
        longest = max((sum(len(n.tokens) for n in leaf.line()) for tree in forest for leaf in tree.leaves()), default=0)
        for row in lay_out(forest, None, max(self.score_tokens, longest)):
            self._score_row(self.model, row, None, True)
            values = self.read(torch.from_numpy(row.parent).to(self.device)).double().tolist()
            for _, node, start, stop in row.nodes:
                if node.author in (Author.POLICY, Author.EXPERT):
                    node.signals["value"] = values[start:stop]
