"""Where a model and its tokenizer come from: a folder, the hub, or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ramulus.learn.policy.hub import NoConfig, offline
from ramulus.learn.policy.model_files import ADAPTER, examine, is_adapter, looks_local, read_json

Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]
ROPE = {  # the kinds whose angles do not depend on the length of a text, and what each needs
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_MORE = (
    "rope_type",
    "rope_theta",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)


@dataclass(frozen=True)
class Pretrained:
    """A causal LM from a local folder or by its name on the hub, or a folder of LoRA adapters, which are added to the model they are of.

    Also a GGUF of llama.cpp (needs ramulus[gguf]): the file, or a folder or repository without another model. It is dequantised, which is said, and
    trained and saved as any other model.

    What is loaded is checked: weights that are missing, of another shape, without a place in the model or not finite are refused, and the
    tokenizer spells as its tokenizer.json says. A vocabulary that is padded beyond the tokenizer's tokens gives these ids no probability, in sampling
    and in training alike, unless `padded_tokens`.

    `max_positions` and `rope` extend its context: `rope` is merged into the model's `rope_parameters` (rope_theta, or a rope_type with its
    factor). LUFFY, SRFT and HPT give Qwen2.5-Math 16384 positions and rope_theta 40000, in place of 4096 and 10000. They are written into the
    model's config, so its checkpoints keep them.

    Raises FileNotFoundError or ValueError, naming the file and the remedy, where something is missing or makes no sense.

    Example:
        >>> from ramulus import Pretrained
        >>> Pretrained("Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16").path
        'Qwen/Qwen2.5-0.5B-Instruct'
    """

    path: str
    dtype: Dtype = "float32"  # of the weights that are trained; "auto" keeps that of the files
    revision: str | None = None  # of the hub
    adapter: str | None = None  # a folder of LoRA adapters by peft that are added to the weights; `path` may itself be one
    extra_weights: bool = False  # leave out weights that the model has no place for, in place of refusing them
    trust_remote_code: bool = False  # run Python code that comes with the model: only for authors you trust
    max_positions: int | None = None  # None leaves those of the model
    rope: dict[str, Any] | None = None
    file: str | None = None  # the GGUF that is meant, where a folder or repository holds several
    padded_tokens: bool = False  # also draw and train the rows of a padded vocabulary, which the tokenizer has no tokens for

    def __post_init__(self) -> None:
        if self.max_positions is not None and self.max_positions < 1:
            raise ValueError(f"max_positions is a number of tokens, at least 1, got {self.max_positions}")
        if self.rope is not None:
            check_rope(self.rope)

    def __call__(self) -> tuple[Any, Any]:
        """(model, tokenizer); the tokenizer pads with EOS where it has no padding token."""
        from ramulus.learn.policy.gguf_file import from_hub, gguf_of
        from ramulus.learn.policy.tokenizer import leave_out_padding

        start = self.local(self.path)
        if start is not None and is_adapter(start):
            if self.adapter is not None:
                raise ValueError(f"{self.path} is a folder of adapters already: set model.path to the model that {self.adapter} is of")
            return replace(self, path=base_of(start), adapter=str(start))()
        if start is not None:
            gguf = gguf_of(start, self.file)
        else:
            gguf = None if self.file is None else from_hub(self.path, self.file, self.revision)
        try:
            model, tokenizer = self.parts(start) if gguf is None else self.of_gguf(gguf)
        except NoConfig:
            model, tokenizer = self.of_gguf(from_hub(self.path, None, self.revision))
        if self.adapter is not None:
            from ramulus.learn.policy.lora import with_adapter

            model = with_adapter(model, self.local(self.adapter) or Path(self.adapter))
        if not self.padded_tokens:
            leave_out_padding(model, tokenizer)
        return model.eval(), tokenizer

    def parts(self, start: Path | None) -> tuple[Any, Any]:
        """Model and tokenizer of a folder, or of the hub where it is None."""
        from transformers import AutoConfig

        from ramulus.learn.policy.loading import dequantising, leave_dequantised, load_weights, silent
        from ramulus.learn.policy.tokenizer import read_tokenizer

        name = str(start or self.path)
        options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if start is None:
            options |= {"local_files_only": True} if offline(self.path, self.revision) else {}
        else:
            examine(start)
        try:
            tokenizer = read_tokenizer(name, **options)
            with silent():
                config = self.extended(AutoConfig.from_pretrained(name, **options))
            quantised = dequantising(config)
            model = load_weights(name, self.extra_weights, config=config, dtype=self.dtype, **options, **quantised)
        except ValueError as error:
            raise ValueError(f"cannot load the model {self.path!r}: {error}") from error
        if quantised:
            leave_dequantised(model, self.dtype)
        return model, tokenizer

    def of_gguf(self, file: Path) -> tuple[Any, Any]:
        """Model and tokenizer of a GGUF."""
        from ramulus.learn.policy.gguf_file import gguf_config, gguf_tokenizer, load_gguf, open_gguf
        from ramulus.learn.policy.tokenizer import with_end

        reader = open_gguf(file)
        try:
            tokenizer = with_end(gguf_tokenizer(file, reader), str(file))
            config = self.extended(gguf_config(file))
            return load_gguf(file, reader, config, self.dtype, self.rope is not None), tokenizer
        except ValueError as error:
            raise ValueError(f"cannot load the model {str(file)!r}: {error}") from error

    @staticmethod
    def local(path: str) -> Path | None:
        """The folder or file that a path means, there or not; None for the name of a model on the hub."""
        folder = Path(path).expanduser()
        return folder if looks_local(path) or folder.exists() or folder.suffix == ".gguf" else None

    def extended(self, config: Any) -> Any:
        """The config with `max_positions` and `rope`."""
        if self.max_positions is None and self.rope is None:
            return config
        rope = getattr(config, "rope_parameters", None)
        if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
            raise ValueError(
                f"max_positions and rope are for models with one set of rotary positions, which {config.model_type!r} is not: leave them out"
            )
        if self.rope is not None:
            merged = rope | self.rope
            if merged.get("rope_type", "default") != "default":
                merged.setdefault("original_max_position_embeddings", config.max_position_embeddings)
            config.rope_parameters = merged
        config.max_position_embeddings = self.max_positions or config.max_position_embeddings
        return config


def check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError for settings of rotary positions that are unknown, incomplete, or change with the length of a text."""
    if not isinstance(rope, dict):
        raise ValueError(f"rope is a set of settings, {{'rope_theta': 40000.0}}, say, got {rope!r}")
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE:
        raise ValueError(
            f"rope_type is one of {', '.join(ROPE)}, got {kind!r}: angles that change with the length of a text make kept keys stale"
        )
    known = {*ROPE_MORE, *(name for names in ROPE.values() for name in names)}
    if unknown := sorted(map(str, rope.keys() - known)):
        raise ValueError(f"unknown rope settings {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    if missing := [name for name in ROPE[kind] if name not in rope]:
        raise ValueError(
            f"rope_type {kind!r} needs {', '.join(missing)}: rope={{'rope_type': {kind!r}, 'factor': 4.0}}, say"
        )
    if wrong := [name for name, value in rope.items() if name != "rope_type" and not is_positive(value)]:
        raise ValueError(f"rope settings are numbers above 0, got {wrong[0]}={rope[wrong[0]]!r}")


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def base_of(adapter: Path) -> str:
    """The model that a folder of adapters was trained on, as its settings name it; ValueError where they name none that is there."""
    named = str(read_json(adapter / ADAPTER).get("base_model_name_or_path") or "")
    folder = Path(named).expanduser()
    if not named or (not folder.exists() and looks_local(named)):
        which = f"of {named!r}, which is not there" if named else "of a model that its settings do not name"
        raise FileNotFoundError(f"the adapters in {adapter} are {which}: set model.path to that model and model.adapter={adapter}")
    return named


@dataclass(frozen=True)
class Scratch:
    """A small Qwen2 with seeded random weights, and a tokenizer that has one token for every character of `alphabet`.

    Raises ValueError for sizes that do not fit together.

    Example:
        >>> from ramulus import Scratch
        >>> model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
        >>> tokenizer("1+2").input_ids == [tokenizer.convert_tokens_to_ids(c) for c in "1+2"]
        True
    """

    alphabet: str
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int | None = None  # width of the feed-forward layers; None takes 4 x hidden
    max_positions: int = 1024
    init_std: float = 0.02  # standard deviation of the random weights
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise ValueError("Scratch needs an alphabet: the characters that problems and answers are written in")
        if min(self.hidden, self.layers, self.heads, self.kv_heads, self.max_positions) < 1:
            raise ValueError(f"the sizes of {self} must be at least 1")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden={self.hidden} must be an even multiple of heads={self.heads}, for rotary positions"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    def __call__(self) -> tuple[Any, Any]:
        """(model, tokenizer), the same ones for the same fields."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        tokenizer = characters(self.alphabet)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=self.hidden, intermediate_size=self.intermediate or 4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions, tie_word_embeddings=False, bos_token_id=None,
            initializer_range=self.init_std,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Qwen2ForCausalLM(config)
        return model.to(getattr(torch, self.dtype)).eval(), tokenizer


def characters(alphabet: str) -> Any:
    """A fast tokenizer with <pad>, <eos>, <unk> and one token a character; decoding gives back every text over the alphabet.

    It spells characters by their bytes, as Qwen2's own does: AutoTokenizer reads the tokenizer of any Qwen2 folder as Qwen2Tokenizer,
    whatever class the folder names, and would drop the spaces and newlines of another kind. Beyond ASCII a character is several bytes,
    merged to one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [split.pre_tokenize_str(character)[0][0] for character in sorted(set(alphabet))]
    merges = [(word[:n], word[n]) for word in spelled for n in range(1, len(word))]
    tokens = ["<pad>", "<eos>", "<unk>", *spelled, *(part for merge in merges for part in merge)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
