"""LoRA (arXiv 2106.09685) by peft: the only file that imports it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramulus.learn.policy.model_files import ADAPTER, check_weights
from ramulus.models.errors import sentence
from ramulus.models.precision import is_half

if TYPE_CHECKING:
    from torch import Tensor


ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters and keep the model's own weights as they are.

    Example:
        >>> from ramulus import Lora
        >>> Lora(rank=8).targets
        'all-linear'
    """

    rank: int = 16
    alpha: int = 32  # the adapters' output is scaled by alpha / rank
    targets: tuple[str, ...] | str = ALL_LINEAR  # names of layers, none of embeddings or output; "all-linear" takes every other

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank must be at least 1 and lora.alpha above 0, got {self.rank} and {self.alpha}")


def attach(model: Any, lora: Lora) -> Any:
    """Put adapters into `model`, in place, and freeze the rest; returns peft's wrapper. They start as zero: the model is unchanged.

    Warns where "all-linear" reaches less than half of the matrices between embeddings and output layer. Raises ImportError, naming the extra, without
    peft; ValueError where no layer has a target's name, where one is of embeddings or the output layer, and where the model fails with adapters.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "ramulus[lora]"') from error
    refuse_ends(model, lora)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    sizes = {name: p.numel() for name, p in matrices(model)}
    try:
        wrapped = get_peft_model(model, config)
        try_adapters(model)
    except (TypeError, AttributeError, RuntimeError, LookupError, NotImplementedError) as error:
        words = f"{type(model).__name__} cannot be trained by LoRA with lora.targets={lora.targets!r} ({type(error).__name__}: {sentence(error)})"
        raise ValueError(f"{words}: name other layers, or leave LoRA out") from error
    if lora.targets == ALL_LINEAR:
        say_share(model, sizes)
    return wrapped


def refuse_ends(model: Any, lora: Lora) -> None:
    """Raise ValueError for targets among embeddings and the output layer, which other parts of the model, and the learner, read as they are."""
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in model.named_modules() if lora.targets != ALL_LINEAR else ():
        if isinstance(module, nn.Embedding) or module is head:
            hit = re.fullmatch(lora.targets, name) if isinstance(lora.targets, str) else any(f".{name}".endswith(f".{one}") for one in lora.targets)
            if hit:
                what = "the output layer" if module is head else "embeddings"
                raise ValueError(f"lora.targets={lora.targets!r} names {name}, {what}, which cannot have adapters: leave it out")


def matrices(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The named weights of two and more dimensions, but those of embeddings and the output layer."""
    from torch import nn

    ends = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    ends |= set() if head is None else {id(p) for p in head.parameters()}
    return ((name, p) for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in ends)


def try_adapters(model: Any) -> None:
    """Run a few tokens through an adapted model, there and back; what fails is raised as it is."""
    import torch

    weight = model.get_input_embeddings().weight
    ids = (torch.arange(5, device=weight.device) + 1)[None] % len(weight)
    with torch.enable_grad():
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def say_share(model: Any, sizes: dict[str, int]) -> None:
    """Warn where adapters reach less than half of the numbers in matrices, by name and size as they were without adapters."""
    from peft.tuners.lora import LoraLayer

    reached = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            reached.add(f"{name}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", ""))
    share = sum(size for name, size in sizes.items() if name in reached) / max(1, sum(sizes.values()))
    if share < 0.5:
        left = max((name for name in sizes if name not in reached), key=sizes.__getitem__)
        words = f"LoRA adapts {share:.0%} of the numbers in this model's matrices, the rest stays as it is ({left} and others)"
        warnings.warn(f"{words}: train without LoRA where that should learn too", stacklevel=2)


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapters that peft wrote in `folder` added to its weights, a plain model again, all of which can be trained.

    Where they are of the head or of the embeddings, and the model has one matrix for both, it has two afterwards. Raises ImportError without peft;
    ValueError for a folder that holds no adapters, those of another model, or such as cannot be added to weights.
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ADAPTER} is not read: {sentence(error)}") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"the adapters in {folder} are of the kind {_kind(config)}, which is added to prompts, not to weights: train from LoRA's")
    try:
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
    untie(wrapped)
    if is_half(model):
        words = f"adapters are added to weights in {str(model.dtype).removeprefix('torch.')}, which rounds most of what they learned away"
        warnings.warn(f"{words} where that is small: set model.dtype=float32", stacklevel=3)
    try:
        plain = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, AttributeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"the adapters in {folder}, of the kind {_kind(config)}, cannot be added to weights: {sentence(error)}") from error
    return plain.requires_grad_(True)


def _kind(config: Any) -> str:
    """What peft calls a kind of adapters."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def untie(wrapped: Any) -> None:
    """Where adapters are of the head or of the embeddings alone, and both are one matrix, give the head a copy, with a warning."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from torch.nn import Parameter

    model: Any = wrapped.get_base_model()
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends]
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else getattr(end, "original_module", end) for end in ends]
    if None in ends or plain[0].weight is not plain[1].weight or not any(adapted):
        return
    plain[1].weight = Parameter(plain[1].weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    warnings.warn("the adapters are of the head or of the embeddings, which this model has as one matrix: from here on it has two", stacklevel=3)


@contextmanager
def without(wrapped: Any) -> Iterator[None]:
    """Inside, the model answers as it was before any adapter."""
    with wrapped.disable_adapter():
        yield


def merged(model: Any) -> dict[str, Tensor]:
    """The state dict of the adapted `model` with adapters added to the weights, under the names it had without them.

    What adapters were added to is in float32 at least: to half precision most of what is learned at small learning rates would be lost. Nothing
    is changed in place: merging and unmerging would round the frozen weights. Raises ValueError for adapters that cannot be added.
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
                    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                    tensor = tensor + sum(delta.reshape(tensor.shape).to(tensor.dtype) for delta in deltas)
            answer[name.replace(".base_layer", "")] = tensor
    return answer
