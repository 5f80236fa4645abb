"""What lies in a model folder, looked at before anything is loaded: files that are missing, torn, or something else."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ramulus.core.json_object import read_object
from ramulus.models.smollm2 import SMOLLM2

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
ADAPTER = "adapter_config.json"
JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", ADAPTER)
COPY_AGAIN = "download or copy it again"


def looks_local(path: str) -> bool:
    """Whether a name is meant as a folder: hub names have one slash at most and begin with a letter."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or "\\" in path


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters of a model and not a model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def examine(folder: Path) -> None:
    """Raise FileNotFoundError where a model folder lacks what it needs, ValueError where a file is not what its name says."""
    if not folder.is_dir() and folder.name == SMOLLM2.name:
        raise FileNotFoundError(f"there is no model folder {folder}: `python -m ramulus.models.smollm2 {folder}` gets it")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no model folder {folder}{near(folder)}: check the path, or give the name of a model on the hub (Qwen/Qwen3-0.6B)"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no model folder, it has no config.json: give the folder that save_pretrained wrote"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise FileNotFoundError(
            f"the model folder {folder} holds no weights (*.safetensors): download or copy them too"
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(
            f"the model folder {folder} holds no tokenizer (tokenizer.json): save it there with tokenizer.save_pretrained"
        )
    for name in JSON:
        if (folder / name).is_file():
            read_json(folder / name)
    for file in weight_files(folder):
        check_weights(file)


def near(folder: Path) -> str:
    """Folders beside it with almost its name, as words for a sentence."""
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.7)
    return f" (there is {folder.parent / close[0]})" if close else ""


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights are read from. Raises FileNotFoundError where the index names one that is not there."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        listed = sorted(set(read_json(file).get("weight_map", {}).values()))
        if missing := [part for part in listed if not (folder / part).is_file()]:
            lacks = f"lacks {len(missing)} of its {len(listed)} files of weights, {missing[0]} first"
            raise FileNotFoundError(f"the model folder {folder} {lacks}: {COPY_AGAIN}")
        return [folder / part for part in listed]
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern) if path.suffix != ".json")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError, naming it, where there is none."""
    with open(file, "rb") as opened:
        refuse_other(file, opened.read(512))
    return read_object(file, COPY_AGAIN)


def refuse_other(file: Path, start: bytes) -> None:
    """Raise ValueError where the first bytes of a file are those of something that often lies in its place."""
    if not start:
        raise ValueError(f"{file} is empty: {COPY_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull` in its repository")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{file} is a web page and not the file itself: {COPY_AGAIN}, with an address that gives the raw file")


def check_weights(file: Path) -> None:
    """Raise ValueError where a file of weights is something else or not whole."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(512)
        refuse_other(file, start)
        if file.suffix != ".safetensors":
            if not start.startswith((b"PK", b"\x80")):
                raise ValueError(f"{file} holds no weights that torch saved: {COPY_AGAIN}")
            return
        length = int.from_bytes(start[:8], "little")
        opened.seek(8)
        try:
            header = json.loads(opened.read(length)) if 8 + length <= size else {}
            whole = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ValueError(f"{file} is no file of safetensors: {COPY_AGAIN}") from None
    if 8 + length > size or size < whole:
        held = f"{size} of {whole} bytes" if header else f"{size} bytes"
        raise ValueError(f"{file} is not whole, it has {held}: {COPY_AGAIN}")
