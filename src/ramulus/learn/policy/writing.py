"""Models as plain Hugging Face folders that transformers 4 and 5, vLLM and llama.cpp's converter read alike; read back and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramulus.learn.policy.loading import load_weights, silent
from ramulus.learn.policy.tokenizer import CAME_WITH, SAMPLE, read_tokenizer

BACKEND = "TokenizersBackend"  # transformers 5's name of a tokenizer that is its tokenizer.json; transformers 4 knows it by another
NUMERALS = ("rope_theta", "partial_rotary_factor")  # of rope_parameters, which stand beside rope_scaling in transformers 4
REWRITTEN: dict[str, str] = {}  # from a config as transformers writes it to how it is kept: every checkpoint of a run has the same
OTHER_NUMERALS = {("gpt_neox", "rope_theta"): "rotary_emb_base", ("gpt_neox", "partial_rotary_factor"): "rotary_pct"}


def write_model(folder: Path | str, model: Any, tokenizer: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Write weights (those of `state` where given), config and tokenizer; no tokenizer where it is None."""
    folder = Path(folder)
    with silent():
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))  # which it empties
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        rewrite(folder / "tokenizer_config.json", lambda settings: tokenizer_for_all(settings, getattr(tokenizer, CAME_WITH, None)))
    config = folder / "config.json"
    plain = config.read_text()
    if plain not in REWRITTEN:
        before = read_config(folder)
        rewrite(config, lambda settings: config_for_all(settings, model.config.attribute_map))
        after = read_config(folder)
        own_ways = any(after.get(name) != value for name, value in before.items())  # of a family
        REWRITTEN[plain] = plain if own_ways else config.read_text()
    config.write_text(REWRITTEN[plain])


def rewrite(file: Path, change: Any) -> None:
    """Replace the content of a JSON file by what `change` makes of it."""
    file.write_text(json.dumps(change(json.loads(file.read_text())), indent=2, ensure_ascii=False) + "\n")


def config_for_all(settings: dict[str, Any], other_names: Mapping[str, str]) -> dict[str, Any]:
    """A config of transformers 5 with what transformers 4 and its readers look for: torch_dtype, rope_theta, rope_scaling.

    `other_names`: of settings, by which transformers 5 knows them too; some were their own in transformers 4.
    """
    older: dict[str, Any] = {"torch_dtype": settings["dtype"]} if "dtype" in settings else {}
    older |= {other: settings[name] for other, name in other_names.items() if name in settings}
    rope = settings.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    if "rope_theta" in full:
        older |= {OTHER_NUMERALS.get((settings["model_type"], name), name): full[name] for name in NUMERALS if name in full}
        scaling = {name: value for name, value in full.items() if name not in NUMERALS}
        older["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "rope_theta" in rope.get("sliding_attention", {}):
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return older | settings


def tokenizer_for_all(settings: dict[str, Any], came_with: str | None) -> dict[str, Any]:
    """The settings of a tokenizer of transformers 5 under the names of transformers 4, with the class that it came with."""
    kind = settings.get("tokenizer_class")
    extra = settings.get("extra_special_tokens")
    kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only", "extra_special_tokens")}
    named = {"additional_special_tokens": extra} if isinstance(extra, list) else {"extra_special_tokens": extra} if extra else {}
    return kept | named | {"tokenizer_class": came_with or ("PreTrainedTokenizerFast" if kind == BACKEND else kind)}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder as transformers reads it."""
    from transformers import AutoConfig

    with silent():
        return dict(AutoConfig.from_pretrained(folder).to_dict())


@torch.no_grad()
def read_back(folder: Path | str, model: Any, tokenizer: Any, state: Mapping[str, Tensor]) -> None:
    """Load what was written and hold it against the weights of `state`, the answers of `model` and the tokenizer; torch's generators stay.

    Raises RuntimeError, naming what differs: what was written cannot be used.
    """
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        again = load_weights(str(folder), config=AutoConfig.from_pretrained(folder), dtype=model.dtype).eval()
    for name, tensor in again.state_dict().items():
        if name not in state or not torch.equal(tensor, state[name].to(tensor.device)):
            raise RuntimeError(f"the model in {folder} is not the one that was written: its {name} differs: please report it")
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(12) * 7 + 1)[None] % size
    here, there = (net(ids.to(net.device), use_cache=False).logits.float().cpu() for net in (model, again))
    off = float((here - there).abs().max() / here.abs().max().clamp(min=1))
    if not off <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise RuntimeError(f"the model in {folder} answers otherwise than the one that was written, by {off:.2g}: please report it")
    if tokenizer is not None and read_tokenizer(str(folder))(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids:
        raise RuntimeError(f"the tokenizer in {folder} spells otherwise than the one that was written: please report it")
