"""The small things every model needs before it can answer: threads, device, EOS, text of tokens."""

from __future__ import annotations

import gc
import re
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ramulus.core import store, tagged_json
from ramulus.core.run_folder import is_model, is_run, model_folder
from ramulus.native.processors import cores
from ramulus.tasks.chat import chat_template

_LIBRARIES = r"(transformers|peft|huggingface_hub|accelerate|torch)(\.|$)"


def quiet() -> None:
    """No progress bars of transformers between our own lines, and no advice of libraries to their programmers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    advice: tuple[type[Warning], ...] = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    for kind in advice:
        warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)
    warnings.filterwarnings("ignore", module=r"peft(\.|$)")


def encode_quickly() -> None:
    """Files of trees are written by orjson where it is installed."""
    try:
        import orjson
    except ImportError:
        return

    def shortest(values: array[float]) -> list[float]:
        return orjson.loads(orjson.dumps(np.frombuffer(values, np.float32), option=orjson.OPT_SERIALIZE_NUMPY))

    store.QUICK, tagged_json.FEW_DIGITS = orjson.dumps, shortest


def collect_seldom() -> None:
    """Python's collector walks through what was made since the imports, and not at every turn: trees are many small objects in cycles."""
    gc.freeze()
    gc.set_threshold(50_000)


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """`collect_seldom` while entered; on leaving, the collector has its thresholds back and what was frozen is collected again."""
    before, count = gc.get_threshold(), gc.get_freeze_count()
    collect_seldom()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not count:
            gc.unfreeze()


def set_threads(threads: int | None) -> int:
    """Give torch its threads (None: all cores this process may use); returns the number."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}: leave it out for all cores")
    count = threads or cores()
    torch.set_num_threads(count)
    return count


def eos_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS, those of the model's config and generation settings, and what the chat template writes
    behind an assistant's turn.

    Raises ValueError for a tokenizer without EOS, or with one that the model does not know.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    remedy = "set eos_token in its tokenizer_config.json to a token of the model"
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no EOS token, so no response could end: {remedy}")
    listed = [tokenizer.eos_token_id]
    for settings in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        eos = getattr(settings, "eos_token_id", None)
        listed += eos if isinstance(eos, list | tuple) else [eos]
    chats = chat_template(tokenizer)
    listed += [chats.turn_end()] if chats is not None else []
    ends = tuple(dict.fromkeys(int(end) for end in listed if end is not None))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if ends[0] >= vocabulary:
        raise ValueError(
            f"the tokenizer {name!r} has the EOS token {tokenizer.eos_token!r} with id {ends[0]}, but the model has {vocabulary} tokens, "
            f"so no response could end: {remedy}"
        )
    return ends


def model_path(name: str) -> str:
    """A model folder, GGUF file or hub name as it is; of the folder of a run, or of a stage of one, the model of its last checkpoint.

    Raises FileNotFoundError for a path in `runs` where there is nothing.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise NotADirectoryError(f"{name} is a file and no GGUF: name the folder of a model or of a run")
    if is_run(path) and not is_model(path):
        return str(model_folder(path, "last")[0])
    if "runs" in path.parts[:-1] and not path.exists():
        remedy = "run `make quickstart` first" if "quickstart" in path.parts else "train it first"
        raise FileNotFoundError(f"there is no run at {name} to take the model from: {remedy}, or name another model")
    return name


@dataclass(frozen=True, eq=False)
class Detokenizer:
    """Text of token ids as rewards see it: special tokens such as <answer> stay in it, those that begin, end or fill a text do not."""

    tokenizer: Any
    ends: tuple[int, ...] = ()  # of the model, besides the tokenizer's EOS

    @cached_property
    def silent(self) -> frozenset[int]:
        """Ids that leave no text; a padding token that is a word like any other, as some models have it, leaves its own."""
        named = {name: getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        if named["pad"] is not None and is_word(self.tokenizer, int(named["pad"])):
            named["pad"] = None
        return frozenset((*self.ends, *(int(token) for token in named.values() if token is not None)))

    def __call__(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in self.silent]
        return self.tokenizer.decode(kept, skip_special_tokens=False)


def is_word(tokenizer: Any, token: int) -> bool:
    """Whether a token is text like any other, whatever role it was given besides: its model of text spells it so, and it has no brackets."""
    word, backend = tokenizer.convert_ids_to_tokens(token), getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or re.fullmatch(r"[<\[{].*[>\]}]", word):
        return False
    return [part.id for part in backend.model.tokenize(word)] == [token]
