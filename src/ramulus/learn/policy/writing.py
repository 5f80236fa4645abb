"""Models as plain Hugging Face folders that transformers 4 and 5, vLLM and llama.cpp's converter read alike; read back and compared."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramulus.learn.policy.loading import load_weights, silent
from ramulus.learn.policy.tokenizer import CAME_WITH, SAMPLE, read_tokenizer
from ramulus.models.precision import HALVES, widened
from ramulus.models.survey import attending_by, plain_way, survey

BACKEND = "TokenizersBackend"  # transformers 5's name of a tokenizer that is its tokenizer.json; transformers 4 knows it by another
NUMERALS = ("rope_theta", "partial_rotary_factor")  # of rope_parameters, which stand beside rope_scaling in transformers 4
TRIED_WHOLE = 2**31  # bytes of weights that are written on trial
REWRITTEN: dict[str, str] = {}  # from a config as transformers writes it to how it is kept: every checkpoint of a run has the same
OTHER_NUMERALS = {("gpt_neox", "rope_theta"): "rotary_emb_base", ("gpt_neox", "partial_rotary_factor"): "rotary_pct"}


def write_model(folder: Path | str, model: Any, tokenizer: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Write weights (those of `state` where given), config and tokenizer; no tokenizer where it is None."""
    folder = Path(folder)
    wide = width(model, model.state_dict() if state is None else state)
    with silent():
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))  # which it empties
    if wide != model.dtype:
        rewrite(folder / "config.json", lambda settings: settings | {"dtype": str(wide).removeprefix("torch.")})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        rewrite(folder / "tokenizer_config.json", lambda settings: tokenizer_for_all(settings, getattr(tokenizer, CAME_WITH, None)))
    config = folder / "config.json"
    plain = config.read_text()
    if plain not in REWRITTEN:
        REWRITTEN[plain] = for_all(config, plain, model)
    config.write_text(REWRITTEN[plain])


def for_all(file: Path, plain: str, model: Any) -> str:
    """The config that lies in `file` as other readers find it too; as it is where transformers would read something else, or nothing, from that."""
    trust = own_code(model)
    before = read_config(file.parent, trust)
    try:
        rewrite(file, lambda settings: config_for_all(settings, model.config.attribute_map))
        after = read_config(file.parent, trust)
    except (ValueError, TypeError, AttributeError, LookupError):
        return plain
    own_ways = any(after.get(name) != value for name, value in before.items())  # of a family
    return plain if own_ways else file.read_text()


def width(model: Any, state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that loses nothing of these weights: float32 for a model in half precision into some of whose matrices adapters were merged."""
    own = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    wider = (t.dtype == torch.float32 and t.ndim > 1 and not any(part in name for part in own) for name, t in state.items())
    dtype: torch.dtype = model.dtype
    return torch.float32 if dtype in HALVES and any(wider) else dtype


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


def own_code(*parts: Any) -> bool:
    """Whether a model, or one of some parts of it, runs Python code that came with it: what is written holds the same code."""
    return any(type(one).__module__.startswith("transformers_modules") for part in parts for one in (part, getattr(part, "config", None)))


def read_config(folder: Path, trust: bool = False) -> dict[str, Any]:
    """The config of a folder as transformers reads it."""
    from transformers import AutoConfig

    with silent():
        return dict(AutoConfig.from_pretrained(folder, trust_remote_code=trust).to_dict())


@torch.no_grad()
def read_back(folder: Path | str, model: Any, tokenizer: Any, state: Mapping[str, Tensor]) -> None:
    """Load what was written and hold it against the weights of `state`, the answers of `model` and the tokenizer; torch's generators stay.

    Raises RuntimeError, naming what differs: what was written cannot be used. ValueError where it cannot be loaded.
    """
    from transformers import AutoConfig

    trust = own_code(model, tokenizer)
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        again = load_weights(str(folder), config=config, dtype=width(model, state), trust_remote_code=trust).eval()
    for name, tensor in again.state_dict().items():
        if name not in state or not torch.equal(tensor, state[name].to(tensor.device, torch.promote_types(tensor.dtype, state[name].dtype))):
            raise RuntimeError(f"the model in {folder} is not the one that was written: its {name} differs: please report it")
    with widened(model), widened(again):  # in half precision rounding may send a token to another expert
        here, there = (answers(net, plain_way(again, survey(again))) for net in (model, again))
    off = float((here - there).abs().max() / here.abs().max().clamp(min=1))
    if not off <= (1e-3 if again.dtype in (torch.float32, torch.float64) else 0.1):  # numbers between its layers may be rounded still
        raise RuntimeError(f"the model in {folder} answers otherwise than the one that was written, by {off:.2g}: please report it")
    check_spelling(folder, tokenizer)


def answers(net: Any, way: str) -> Tensor:
    """Logits [1, 12, V] of a few tokens, where attention goes this way."""
    ids = (torch.arange(12) * 7 + 1)[None] % net.get_input_embeddings().weight.shape[0]
    with attending_by(net, way):
        logits: Tensor = net(ids.to(net.device), use_cache=False).logits.float().cpu()
    return logits


def check_spelling(folder: Path | str, tokenizer: Any) -> None:
    """Raise RuntimeError where the tokenizer in a folder spells otherwise than this one; nothing is asked where it is None."""
    if tokenizer is not None:
        again = read_tokenizer(str(folder), trust_remote_code=own_code(tokenizer))
        if again(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids:
            raise RuntimeError(f"the tokenizer in {folder} spells otherwise than the one that was written: please report it")


def try_writing(model: Any, tokenizer: Any, state: Mapping[str, Tensor] | None) -> bool:
    """Write a model and read it back, before work that could not be saved; whether its weights were among it, or settings and tokenizer alone.

    The weights are not where they, or the room for them among temporary files, would make it slow. `state` as `write_model` takes it. Raises
    ValueError, in one sentence, where what is written cannot be read.
    """
    size = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory(prefix="ramulus-") as work:
        whole = size <= TRIED_WHOLE and 2 * size <= shutil.disk_usage(work).free
        weights = dict(model.state_dict() if state is None else state) if whole else {}
        try:
            write_model(work, model, tokenizer, dict(weights) if state is not None or not whole else None)
            read_back(work, model, tokenizer, weights) if whole else check_spelling(work, tokenizer)
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
            why = " ".join(str(error.__cause__ or error).split()).replace(work, "a folder for trial")[:300]
            what = f"{type(model).__name__} cannot be saved so that it can be read again, so nothing that it learns would last"
            raise ValueError(f"{what}: {why}") from error
    return whole
