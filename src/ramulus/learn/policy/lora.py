"""LoRA (arXiv 2106.09685) by peft: the only file that imports it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramulus.learn.policy.model_files import ADAPTER, check_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters and keep the model's own weights as they are."""

    rank: int = 16
    alpha: int = 32  # the adapters' output is scaled by alpha / rank
    targets: tuple[str, ...] | str = (
        "all-linear"  # names of the layers to adapt; "all-linear" takes all but the output layer
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank must be at least 1 and lora.alpha above 0, got {self.rank} and {self.alpha}")


def attach(model: Any, lora: Lora) -> Any:
    """Put adapters into `model`, in place, and freeze the rest; returns peft's wrapper. They start as zero: the model is unchanged.

    Raises ImportError, naming the extra, without peft; ValueError where no layer has a target's name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "ramulus[lora]"') from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapters that peft wrote in `folder` added to its weights, a plain model again.

    Raises ImportError without peft; ValueError for a folder that holds no adapters, or those of another model.
    """
    try:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError('adapters need peft: pip install "ramulus[lora]"') from error
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"there are no adapters in {folder}: it has no {ADAPTER}")
    for file in [*folder.glob("adapter_model*.safetensors"), *folder.glob("adapter_model*.bin")]:
        check_weights(file)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config)
        report: Any = set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapters in {folder} are not of this model ({why}): set model.path to theirs") from error
    missing = [key for key in report.missing_keys if ".lora_" in key or "modules_to_save" in key]
    if missing or report.unexpected_keys:
        first = sorted(missing or report.unexpected_keys)[0]
        raise ValueError(f"the adapters in {folder} are not of this model: {first} is on one side only; set model.path to theirs")
    return wrapped.merge_and_unload()


@contextmanager
def without(wrapped: Any) -> Iterator[None]:
    """Inside, the model answers as it was before any adapter."""
    with wrapped.disable_adapter():
        yield


def merged(model: Any) -> dict[str, Tensor]:
    """The state dict of the adapted `model` with adapters added to the weights, under the names it had without them.

    Nothing is changed in place: merging and unmerging would round the frozen weights. Raises ValueError for adapters that cannot be added.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    answer = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".lora_" in name:
                continue
            owners = [owner for owner in layers if name.startswith(f"{owner}.base_layer.")]
            for owner in owners:  # several where adapters of several parameters of a module are wrapped around each other
                layer, rest = layers[owner], name[len(owner) + 1 :].replace("base_layer.", "")
                if rest == getattr(layer, "parameter_name", "weight"):
                    deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
                    tensor = (tensor + sum(delta.reshape(tensor.shape) for delta in deltas)).to(tensor.dtype)
            answer[name.replace(".base_layer", "")] = tensor
    return answer
