"""Models from llama.cpp's GGUF: which file, whether it is whole and read rightly, its weights dequantised, its tokenizer and chat template.

transformers reads it, with the package `gguf`; what it would leave out and go on without (settings, tensors) is refused here.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ramulus.learn.policy.loading import load_weights, named, silent, unquantised
from ramulus.learn.policy.model_files import COPY_AGAIN, refuse_other
from ramulus.models.errors import sentence
from ramulus.models.splits import mend_split

SUFFIX = ".gguf"
ENDS = ("eos", "eot", "eom")  # the tokens of a GGUF that end a text, a turn, a message that calls a tool
PARTS = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
MEANT = "name the one that is meant"
SAFE = "take the model's safetensors"
NOT_MISSED = {  # settings that transformers leaves out: shapes, which are compared with the weights, and what changes no number
    "vocab_size", "attention.key_length", "attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "tensor_data_layout",
}  # fmt: skip
SAME = {  # settings that it leaves out and that must be what the config has anyhow
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window", "logit_scale": "logits_scaling", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "attention.scale": "attention_multiplier", "attention.causal": "is_causal",
}  # fmt: skip


def gguf_of(path: Path, file: str | None = None) -> Path | None:
    """The GGUF that a path means: the file itself, or the only one, or `file`, of a folder without another model; None where it means none.

    Raises ValueError where there are several, FileNotFoundError where the named one is not there.
    """
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    if file is None and ((path / "config.json").is_file() or next(path.glob("*.safetensors"), None)):
        return None
    name = one_of([entry.name for entry in path.glob(f"*{SUFFIX}")], file, str(path))
    return None if name is None else path / name


def one_of(names: list[str], file: str | None, where: str) -> str | None:
    """The name that is meant among those of GGUF files; None where there are none. Raises as `gguf_of` does."""
    if file is not None:
        if file not in names:
            raise FileNotFoundError(f"{where} holds no {file}: it has {', '.join(sorted(names)) or f'no *{SUFFIX}'}")
        return file
    if len(names) > 1:
        raise ValueError(f"{where} holds {len(names)} GGUF files, {', '.join(sorted(names))}: {MEANT}, model.file={sorted(names)[0]}")
    return names[0] if names else None


def from_hub(repo: str, file: str | None, revision: str | None) -> Path:
    """The GGUF of a repository of the hub, downloaded. Raises ValueError where there is none, or several and no `file` is named."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(repo, revision=revision) if file is None else [file]
        name = one_of([name for name in names if name.endswith(SUFFIX)], file, repo)
        if name is None:
            raise ValueError("on the hub it has no config.json and no *.gguf, so it is no model that could be read")
        return Path(hf_hub_download(repo, name, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {repo!r}: {sentence(error)}") from None


def open_gguf(file: Path) -> Any:
    """gguf's reader of a file. Raises ImportError without the package, FileNotFoundError or ValueError for what is no GGUF, or not all of one."""
    try:
        import accelerate  # noqa: F401 (transformers asks for it)
        import gguf
    except ImportError:
        raise ImportError(f'{file.name} is GGUF, which needs two packages more: pip install "ramulus[gguf]"') from None
    try:
        import transformers.integrations.gguf
    except ImportError:
        import transformers

        raise ImportError(f"{file.name} is GGUF, which needs transformers 5.17 or newer, and this is {transformers.__version__}: update it") from None
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: check the path")
    if PARTS.search(file.name):
        raise ValueError(f"{file} is a part of a GGUF: join the parts with llama.cpp's `llama-gguf-split --merge`")
    with open(file, "rb") as raw:
        start = raw.read(512)
    refuse_other(file, start)
    if not start.startswith(b"GGUF"):
        raise ValueError(f"{file} is no GGUF: {COPY_AGAIN}")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # it trusts every length in the file
        if "GGMLQuantizationType" in str(error):
            raise ValueError(f"{file} has weights in a form that the package gguf does not know ({sentence(error)}): update it, or {SAFE}") from None
        raise ValueError(f"{file} is not whole, or no GGUF ({sentence(error)}): {COPY_AGAIN}") from None
    for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except Exception:
            raise ValueError(f"{file} has weights in {kind.name}, which cannot be dequantised here: {SAFE}, or a GGUF in Q8_0, say") from None
    return reader


@contextmanager
def by_itself(file: Path) -> Iterator[Path]:
    """A folder in which a GGUF lies alone, under its name: transformers would mix files of another model beside it into what it reads."""
    with tempfile.TemporaryDirectory(prefix="ramulus-") as work:
        try:
            os.symlink(file.resolve(), Path(work) / file.name)
        except OSError:  # a system that makes no links
            os.link(file.resolve(), Path(work) / file.name)
        yield Path(work)


def gguf_config(file: Path) -> Any:
    """The config of a GGUF. Raises ValueError as transformers does."""
    from transformers import AutoConfig

    with by_itself(file) as folder, silent():
        return AutoConfig.from_pretrained(str(folder), gguf_file=file.name)


def gguf_settings(reader: Any) -> dict[str, Any]:
    """The settings of the architecture, without its name before them; `architecture` among them."""
    settings = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    kind = str(settings.get("general.architecture", ""))
    return {name.removeprefix(f"{kind}."): value for name, value in settings.items() if name.startswith(f"{kind}.")} | {"architecture": kind}


def check_settings(file: Path, reader: Any, config: Any, rope_given: bool) -> None:
    """Raise ValueError, naming them, for settings that transformers leaves out although they change what the model computes."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING as NAMES

    settings = gguf_settings(reader)
    kind = str(settings.pop("architecture"))
    text = config.get_text_config()
    names: Any = NAMES["config"]
    taken = {*names.get(kind.replace("-", "_"), {}), *names.get(text.model_type, {})}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotary = head * float((getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    lost = []
    for name, value in settings.items():
        fine = name in NOT_MISSED or (name.startswith("rope.") and rope_given)
        fine = fine or (name == "rope.dimension_count" and value == rotary) or (name == "rope.scaling.type" and value == "none")
        fine = fine or (name in SAME and getattr(text, SAME[name], None) == value) or (name in taken and name != "rope.dimension_count")
        if not fine:
            lost.append(f"{name}={value}")
    if lost:
        rope = ", or give its rotary positions by model.rope" if all(name.startswith("rope.") for name in lost) else ""
        raise ValueError(f"transformers does not read {named(lost)} of {file.name}, and would compute something else: {SAFE}{rope}")


def load_gguf(file: Path, reader: Any, config: Any, dtype: str, rope_given: bool) -> Any:
    """The model of a GGUF, dequantised: like any other, which can be trained and saved. `dtype` "auto" is float32."""
    from transformers import GgufConfig

    check_settings(file, reader, config, rope_given)
    dtype = "float32" if dtype == "auto" else dtype
    options: dict[str, Any] = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    with without_bar(), by_itself(file) as folder:
        model = load_weights(str(folder), config=config, dtype=dtype, **options)
    unread = [name for name in tensors_left(model, reader) if not (rope_given and name.startswith("rope_"))]
    if unread:
        rope = ", or give its rotary positions by model.rope" if all(name.startswith("rope_") for name in unread) else ""
        raise ValueError(f"transformers has no place for {named(unread)} of {file.name}, and would compute something else: {SAFE}{rope}")
    unquantised(model)
    model.config.name_or_path = str(file)
    ends = [reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ENDS if f"tokenizer.ggml.{name}_token_id" in reader.fields]
    if len(set(ends)) > 1:
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    most = kinds.most_common(1)[0][0]
    done = f"read as {dtype}" if most in ("F32", "F16", "BF16") else f"dequantised to {dtype}: what is trained are these rounded weights"
    warnings.warn(f"{file.name} is GGUF in {most}, {done}", stacklevel=2)
    return model


@contextmanager
def without_bar() -> Iterator[None]:
    """Inside, transformers' reader of GGUF draws no bar: its own switch does not reach it."""
    from transformers import modeling_gguf_pytorch_utils as reading

    bar = reading.tqdm
    reading.tqdm = lambda tensors, **_: tensors  # type: ignore[assignment]
    try:
        yield
    finally:
        reading.tqdm = bar


def tensors_left(model: Any, reader: Any) -> list[str]:
    """The tensors of a file that have no place in the model."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    kind = str(gguf_settings(reader)["architecture"])
    if is_gguf_arch_supported(kind):  # read another way, which tells of what is left
        return []
    processor = reading.TENSOR_PROCESSORS.get(kind, reading.TensorProcessor)(config=model.config.to_dict())
    places = reading.get_gguf_hf_weights_map(model, processor)
    return [tensor.name for tensor in reader.tensors if tensor.name not in places and "_exps" not in tensor.name]


def gguf_tokenizer(file: Path, reader: Any) -> Any:
    """The tokenizer of a GGUF, with its chat template; warns as `mend_split` does."""
    from transformers import AutoTokenizer

    try:
        with by_itself(file) as folder, silent():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
        tokenizer.name_or_path = str(file)
    except ValueError as error:
        raise ValueError(f"transformers cannot make a tokenizer of what it holds ({error}): {SAFE}") from error
    fields = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre") if f"tokenizer.ggml.{name}" in reader.fields}
    if fields.get("model") == "gpt2":
        mend_split(tokenizer, str(fields.get("pre", "default")), file.name)
    return tokenizer
