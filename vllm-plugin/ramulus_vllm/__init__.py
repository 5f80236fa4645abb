"""Ramulus inside a vLLM server: installed into the server's environment, found by vLLM through the entry point `vllm.general_plugins`.

`weights.py` takes weights, from safetensors or by the ways of `transfer.py`, `heat.py` samples at temperatures by entropy, `gate.py` is the server's
door, `serve.py` starts one.
"""

import os
import signal
import threading
import time

BACKEND = "ramulus"  # the name of the weight transfer
WINDOW = ((0, 31), (0, 33))  # of vLLM: the first and the last that this package fits
TIED = "RAMULUS_TIED"  # of the environment: the server ends with whoever started it


def register() -> None:
    """Make the weight transfer known, and in a server that is tied end with the process above; vLLM calls this in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "ramulus_vllm.weights", "Weights")
    if os.environ.get(TIED):
        threading.Thread(target=outlived, args=(os.getppid(),), daemon=True).start()


def outlived(parent: int) -> None:
    """End this process group once the process above is gone: whoever kills a server alone (Ray does) leaves none of its own running."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGKILL)
