"""How the tokenizers of GGUF files split text before they merge it, by the name that the file gives; what transformers does not know of it."""

from __future__ import annotations

import warnings
from typing import Any

DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}  # as GPT-2 does, and digits from each other
LIKE_GPT2 = {
    "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion",
}  # fmt: skip


def mend_split(tokenizer: Any, pre: str, file: str) -> None:
    """Split the text of a byte-level tokenizer that transformers read from `file` as the name `pre` says; warns where nobody here knows it."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre in DIGITS:
        split = [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    elif pre not in LIKE_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        warnings.warn(
            f"transformers does not know how {file} splits text ({pre!r}) and splits as GPT-2 does: its tokens may not be those "
            "that the model learned",
            stacklevel=2,
        )
