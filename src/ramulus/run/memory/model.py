"""The sizes of a recipe's model, without loading it: from the folder, from what its authors publish, or from the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ramulus.learn.policy.model import Pretrained, base_of
from ramulus.learn.policy.model_files import is_adapter
from ramulus.models.sizes import PUBLISHED, Sizes, sizes_of, sizes_of_model
from ramulus.run.config.recipe import Run
from ramulus.run.runtime import model_path, quiet


def planned_sizes(run: Run) -> Sizes:
    """The sizes of the model of a run. Raises ValueError or FileNotFoundError, naming the remedy, where its config cannot be had."""
    quiet()
    source: Any = Pretrained(run.model) if isinstance(run.model, str) else run.model
    if isinstance(source, Pretrained):
        source = replace(source, path=model_path(source.path))
        config = source.extended(config_of(source))
        folder = source.local(source.path)
        sizes, unsaid = sizes_of(config), source.dtype == "auto" and getattr(config, "dtype", None) is None
        return replace(sizes, dtype=dtype_of_files(folder) or sizes.dtype) if folder is not None and unsaid else sizes
    import torch

    with torch.device("meta"):
        model = source()[0]
    return sizes_of_model(model)


def config_of(source: Pretrained) -> Any:
    """The transformers config of a model folder or a name on the hub."""
    from transformers import AutoConfig

    from ramulus.learn.policy.gguf_file import gguf_config, gguf_of
    from ramulus.learn.policy.hub import offline
    from ramulus.learn.policy.loading import silent

    folder = source.local(source.path)
    if folder is not None and is_adapter(folder):
        return config_of(replace(source, path=base_of(folder)))
    if folder is None and source.path in PUBLISHED:
        settings = dict(PUBLISHED[source.path])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    file = gguf_of(folder, source.file) if folder is not None else None
    if file is not None:
        return gguf_config(file)
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    if folder is not None and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {folder}, which a plan is made from: check the path, or get the model first")
    if folder is None and offline(source.path, source.revision):
        options["local_files_only"] = True
    with silent():
        return AutoConfig.from_pretrained(str(folder or source.path), **options)


def dtype_of_files(folder: Path) -> str | None:
    """The dtype of the first weights of floating point in a folder's safetensors; None where there are none."""
    from safetensors import safe_open

    named = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            kinds = (opened.get_slice(key).get_dtype() for key in opened.keys())  # noqa: SIM118
            if (kind := next((named[code] for code in kinds if code in named), None)) is not None:
                return kind
    return None
