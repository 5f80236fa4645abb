"""A policy that also says what a state is worth: PPO's critic, a head on the same backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramulus.learn.policy.torch_policy import TorchPolicy

SPEED = 10.0  # the head starts from nothing, the backbone from a trained model


class ActorCritic(TorchPolicy):
    """A policy with a value head on its backbone: V(state) is linear in the hidden state that predicts the next token.

    The head starts at 0, learns at SPEED times the policy's rate, and is kept in checkpoints but not in the model's folder. Takes what
    TorchPolicy takes.

    Example:
        >>> import torch
        >>> from ramulus import ActorCritic, Scratch
        >>> model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
        >>> ActorCritic(model).read(torch.ones(2, 16), torch.tensor([0, 0])).tolist()
        [0.0, 0.0]
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        size = model.get_input_embeddings().weight.shape[1]
        self.critic: nn.Linear = nn.Linear(size, 1, device=self.device, dtype=self.dtype)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        head = {f"critic/{name}": p for name, p in self.critic.named_parameters()}
        self.trainable |= head
        self.masters.take(head)
        group = {"params": [self.masters.stepped[name] for name in head], "weight_decay": 0.0, "speed": SPEED}
        self.optimizer.add_param_group(group)

    def read(self, hidden: Tensor, parent: Tensor) -> Tensor:
        """Hidden states [T, d], parent [T] -> values [T], computed in at least float32, under autocast too."""
        kind = torch.promote_types(self.critic.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # which would narrow it
            values: Tensor = F.linear(hidden[parent].to(kind), self.critic.weight.to(kind), self.critic.bias.to(kind))
        return values[:, 0]
