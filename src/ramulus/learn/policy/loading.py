"""Weights as transformers loads them, and what it says of them in silence: missing, unexpected, mismatched, not finite."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from ramulus.models.errors import sentence


def load_weights(name: str, extra: bool = False, **options: Any) -> Any:
    """The causal LM of a folder or hub name, in the precision of `options`.

    Raises ValueError, naming the weights, where some are missing, have other shapes or are no numbers, and unless `extra` where the model has
    no place for some: transformers would fill the gaps with random ones.
    """
    from transformers import AutoModelForCausalLM

    with silent():
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    model, report = loaded
    where = f"the weights of {name} do not fit its config.json"
    if errors := report["error_msgs"]:
        raise ValueError(f"{where}: {' '.join(str(errors[0]).split())}")
    if mismatched := sorted(report["mismatched_keys"]):
        key, shape, wanted = mismatched[0]
        raise ValueError(
            f"{where}: {key} has the shape {list(shape)} where the model wants {list(wanted)}{more(mismatched)}: take the config.json they came with"
        )
    if missing := report["missing_keys"]:
        beside = f", and {named(report['unexpected_keys'])} has no place in it" if report["unexpected_keys"] else ""
        raise ValueError(f"{where}: it lacks {named(missing)}{beside}: download or copy the folder again, or take the config.json they came with")
    if report["unexpected_keys"] and not extra:
        raise ValueError(
            f"{where}: the model has no place for {named(report['unexpected_keys'])}: take the config.json they came with, "
            "or set model.extra_weights=true to leave them out"
        )
    if broken := [key for key, p in model.named_parameters() if not torch.isfinite(p.detach().sum(dtype=torch.float32))]:
        raise ValueError(f"the weights of {name} are not all finite numbers: {named(broken)}: download or copy the folder again")
    return model


def dequantising(config: Any) -> dict[str, Any]:
    """What transformers is told, besides, of a checkpoint in 8 bits by blocks (quant_method fp8), so that its weights are plain numbers anywhere."""
    stated = getattr(config, "quantization_config", None)
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8":
        return {}
    from transformers import FineGrainedFP8Config

    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def unquantised(model: Any) -> None:
    """Have a model whose weights were dequantised call itself plain: as a quantised one it would neither train nor be saved."""
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    for name in ("quantization_method", "_is_quantized"):
        model.__dict__.pop(name, None)


def leave_dequantised(model: Any, dtype: str) -> None:
    """Make a model whose weights were dequantised one of `dtype` like any other, which can be trained and saved; "auto" is bfloat16."""
    dtype = "bfloat16" if dtype == "auto" else dtype
    for parameter in model.parameters():  # rotary frequencies, which are buffers, stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    unquantised(model)
    kept = [one for one in getattr(model, "_weight_conversions", None) or () if not any("scale" in name for name in one.source_patterns)]
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = kept
    warnings.warn(f"the weights are in 8 bits, dequantised to {dtype}: what is trained are these rounded weights", stacklevel=3)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, transformers says nothing below an error and draws no bar. One inside another costs nothing: a change of what is heard makes every
    logger of the process ask anew."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if before != logging.ERROR:
        logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before != logging.ERROR:
            logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def silent() -> Iterator[None]:
    """`unheard`, with what transformers cannot read raised as a ValueError of one sentence; running out of memory goes on as it is."""
    from huggingface_hub.errors import StrictDataclassError

    with unheard():
        try:
            yield
        except StrictDataclassError as error:
            raise ValueError(f"its config.json makes no sense: {sentence(error.__cause__ or error)}") from error
        except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
            if "out of memory" in str(error).lower():
                raise
            raise ValueError(sentence(error)) from error


def named(keys: Collection[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(sorted(keys)[:most]) + more(keys, most)


def more(keys: Collection[Any], most: int = 1) -> str:
    """How many there are beyond those that were named."""
    return f" and {len(keys) - most} more" if len(keys) > most else ""
