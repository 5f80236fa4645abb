"""A tokenizer that spells as its tokenizer.json says, whatever class its folder or its model's family would give it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ramulus.learn.policy.loading import silent

SAMPLE = "12 + 3 = 15,\n\tsays  the naïve 漢字 student. It's x_1 <b>"
CAME_WITH = "_ramulus_class"  # the attribute that keeps the class its folder names, for those who read what we write
SPACED = "1 + 2\n= 3"


def read_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub name; it pads with EOS where it has no padding token.

    transformers builds the tokenizer of some families anew, whatever tokenizer.json holds: where that spells a sample otherwise, the file is
    followed. Warns and raises as `with_end` does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with silent():
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if same_spelling(tokenizer, name, options):
            named = str(get_tokenizer_config(name, **options).get("tokenizer_class") or "")
            setattr(tokenizer, CAME_WITH, named if named.endswith(("Tokenizer", "TokenizerFast")) else None)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **options)
    return with_end(tokenizer, name)


def with_end(tokenizer: Any, name: str) -> Any:
    """The tokenizer, padding with EOS where it has no padding token. Warns of one that loses spaces; ValueError for one without an EOS token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no EOS token, so no answer would ever end: set one and save it, "
            'tokenizer.add_special_tokens({"eos_token": "<eos>"}); tokenizer.save_pretrained(...)'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer(SPACED, add_special_tokens=False).input_ids
    back = str(tokenizer.decode(ids))
    if back.split() == SPACED.split() and back.strip() != SPACED:
        warnings.warn(f"the tokenizer of {name!r} does not keep spaces and line breaks: {SPACED!r} comes back as {back!r}", stacklevel=2)
    return tokenizer


def leave_out_padding(model: Any, tokenizer: Any) -> None:
    """Where the output layer has more rows than the tokenizer has ids, mark on the model how many share the probability: `ramulus_tokens`.

    Engines and learners of this process read it; it is no weight and no setting, and is not saved.
    """
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    head = model.get_output_embeddings()
    if head is not None and head.weight.shape[0] > tokens:
        model.ramulus_tokens = tokens


def same_spelling(tokenizer: Any, name: str, options: dict[str, Any]) -> bool:
    """Whether a tokenizer spells a sample, there and back, as the tokenizer.json of a folder or hub name; True where there is none."""
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    keys = {key: value for key, value in options.items() if key in ("revision", "local_files_only")}
    path = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **keys)
    if path is None or not tokenizer.is_fast:
        return True
    file = Tokenizer.from_file(str(Path(path)))
    ids = file.encode(SAMPLE, add_special_tokens=False).ids
    mine = tokenizer.backend_tokenizer.encode(SAMPLE, add_special_tokens=False).ids
    return bool(ids == mine and file.decode(ids) == tokenizer.backend_tokenizer.decode(ids))
