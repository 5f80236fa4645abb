"""Weights from files of safetensors that the server's machine can read, without a restart."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing is needed."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """A file of safetensors, or a folder of them."""

    path: str = ""


def files(path: str) -> list[Path]:
    """The files of safetensors at a path."""
    place = Path(path)
    return [place] if place.is_file() else sorted(place.glob("*.safetensors"))


def checked(path: str, crc: int | None) -> None:
    """Raise ValueError, before anything is changed, for weights that are not whole: unreadable, cut, or other bytes than were sent."""
    found = files(path)
    if not found:
        raise ValueError(f"the server sees no safetensors at {path}: name a folder that its machine can read")
    for file in found:
        try:
            with safe_open(file, "pt") as opened:
                if not list(opened.keys()):
                    raise ValueError(f"{file} holds no tensors")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weights in {file} are not whole ({error}): send them again") from None
    if crc is not None and checksum(found) != crc:
        raise ValueError(f"the weights in {path} are not those that were sent: send them again")


def checksum(paths: list[Path]) -> int:
    """CRC-32 over the bytes of all files."""
    value = 0
    for path in paths:
        with path.open("rb") as opened:
            while block := opened.read(1 << 24):
                value = zlib.crc32(block, value)
    return value


class FileWeights(WeightTransferEngine[Init, Update]):
    """Reads a checkpoint into the running model, layer by layer, as vLLM loads one at its start."""

    init_info_cls = Init
    update_info_cls = Update
    known: dict[str, list[int]] | None = None  # tensors of weights that were whole, and their shapes

    def init_transfer_engine(self, init_info: Init) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Nothing is changed before the weights are seen to be whole."""

    def receive_weights(self, update_info: Update) -> None:
        """Raises ValueError for weights that lack something; where others were taken before, nothing is changed then."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        found = shapes(update_info.path)
        if self.known is not None and found != self.known:
            wrong = sorted(name for name in found.keys() | self.known.keys() if found.get(name) != self.known.get(name))
            raise ValueError(f"{len(wrong)} tensors are missing, new or of another shape than before, {wrong[0]} say: send all of the model's")
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(tensors(update_info.path))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        tied = bool(getattr(self.model_config.hf_config, "tie_word_embeddings", False))
        if tied:
            head_again(self.model)
        missing = sorted(n for n, _ in self.model.named_parameters() if loaded is not None and n not in loaded and not (tied and "lm_head" in n))
        if missing:
            raise ValueError(f"{len(missing)} of the model's parameters are missing, {missing[0]} say: send all of them")
        self.known = found

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing to close."""


def head_again(model: Any) -> None:
    """A head that shares the embeddings' weights gets none of its own, and on a CPU goes on with what was packed of the former ones: pack it anew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and layer.quant_method is not None:
            layer.quant_method.process_weights_after_loading(layer)


def shapes(path: str) -> dict[str, list[int]]:
    """The tensors at a path and their shapes."""
    found: dict[str, list[int]] = {}
    for file in files(path):
        with safe_open(file, "pt") as opened:
            found |= {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def tensors(path: str) -> Iterator[tuple[str, Any]]:
    """The tensors at a path, one after the other."""
    for file in files(path):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def plain(content: bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else."""
    parsed = json.loads(content)
    if not isinstance(parsed, dict):
        raise ValueError(f"a call is a JSON object, got {type(parsed).__name__}")
    return parsed
