"""The small things every model needs before it can answer: threads, device, EOS, text of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def quiet() -> None:
    """No progress bars of transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def set_threads(threads: int | None) -> int:
    """Give torch its threads (None: the cores this process may use); returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = threads or cores
    torch.set_num_threads(count)
    return count


def device_of(name: str) -> torch.device:
    """cpu, cuda, cuda:1; auto takes cuda where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: not a device; use cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch {torch.__version__} sees no CUDA device here; use device=cpu or auto")
    return device


def eos_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation settings."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [found]
    ends = [tokenizer.eos_token_id, *listed]
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"the tokenizer {name!r} has no EOS token, so no response could end: set eos_token in its tokenizer_config.json")
    return tuple(dict.fromkeys(int(end) for end in ends if end is not None))


@dataclass(frozen=True, eq=False)
class Decoder:
    """Text of token ids, special tokens left out."""

    tokenizer: Any

    def __call__(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)
