"""Weights without a restart: from files of safetensors that the server's machine can read, or by one of the ways of `transfer.py`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing is needed for files. With `way` alone it is asked whether weights can come so; with `join`, that way is opened."""

    way: str = ""
    gpu: str = ""  # the UUID of the sender's
    tensors: list[list[Any]] = field(default_factory=list)  # that will come: name, dtype and shape of each
    join: dict[str, Any] | None = None  # host and port of the sender's store, size of the group, seconds, bytes of a bucket


@dataclass
class Update(WeightTransferUpdateInfo):
    """A file of safetensors, or a folder of them; or what comes by the way that is open."""

    path: str = ""
    tensors: list[list[Any]] = field(default_factory=list)  # name, dtype and shape of each, in the order in which they come
    more: dict[str, Any] = field(default_factory=dict)  # what the way wants to know


Shapes = dict[str, list[int]]


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


class Weights(WeightTransferEngine[Init, Update]):
    """Takes a checkpoint into the running model, layer by layer, as vLLM loads one at its start."""

    init_info_cls = Init
    update_info_cls = Update
    known: Shapes | None = None  # tensors of weights that were whole, and their shapes
    way: Any = None  # that is open

    def init_transfer_engine(self, init_info: Init) -> None:
        """Raises ValueError where weights cannot come as they are meant to, before anything is changed."""
        if not init_info.way:
            return
        from ramulus_vllm.transfer import opened, refuse

        refuse(init_info.way, init_info.gpu, self.device)
        if init_info.join is None:
            self.refuse(shapes_of(init_info.tensors))
            return
        self.shutdown()
        self.way = opened(self, init_info.way, init_info.join)

    def start_weight_update(self) -> None:
        """Nothing is changed before the weights are seen to be whole."""

    def refuse(self, found: Shapes) -> None:
        """Raise ValueError for weights that lack something that others had."""
        if self.known is not None and found != self.known:
            wrong = sorted(name for name in found.keys() | self.known.keys() if found.get(name) != self.known.get(name))
            raise ValueError(f"{len(wrong)} tensors are missing, new or of another shape than before, {wrong[0]} say: send all of the model's")

    def receive_weights(self, update_info: Update) -> None:
        """Raises ValueError for weights that lack something; where others were taken before, nothing is changed then."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        path, loaded, told = update_info.path, set[str](), True

        def load(some: Any) -> set[str]:
            nonlocal told
            names = self.model.load_weights(some)
            loaded.update(names or ())
            told = told and names is not None
            return names or set()

        if not path and self.way is None:
            raise ValueError("no way for weights is open: open one, and send them again")
        found = shapes(path) if path else shapes_of(update_info.tensors)
        self.refuse(found)
        initialize_layerwise_reload(self.model)
        try:
            if path:
                load(tensors(path))
            else:
                self.way.receive(load, update_info.tensors, update_info.more)
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        tied = bool(getattr(self.model_config.hf_config, "tie_word_embeddings", False))
        if tied:
            head_again(self.model)
        missing = sorted(n for n, _ in self.model.named_parameters() if told and n not in loaded and not (tied and "lm_head" in n))
        if missing:
            raise ValueError(f"{len(missing)} of the model's parameters are missing, {missing[0]} say: send all of them")
        self.known = found

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Close the way that is open."""
        if self.way is not None:
            self.way.close()
            self.way = None


def head_again(model: Any) -> None:
    """A head that shares the embeddings' weights gets none of its own, and on a CPU goes on with what was packed of the former ones: pack it anew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and layer.quant_method is not None:
            layer.quant_method.process_weights_after_loading(layer)


def shapes_of(listed: list[list[Any]]) -> Shapes:
    """The same of tensors that are listed by name, dtype and shape."""
    return {str(name): [int(size) for size in shape] for name, _, shape in listed}


def shapes(path: str) -> Shapes:
    """The tensors at a path and their shapes."""
    found: Shapes = {}
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
