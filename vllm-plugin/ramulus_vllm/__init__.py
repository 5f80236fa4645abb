"""Ramulus inside a vLLM server: installed into the server's environment, found by vLLM through the entry point `vllm.general_plugins`.

`weights.py` takes weights from safetensors, `heat.py` samples at temperatures by entropy, `gate.py` is the server's door, `serve.py` starts one.
"""

BACKEND = "ramulus"  # the name of the weight transfer
WINDOW = ((0, 31), (0, 33))  # of vLLM: the first and the last that this package fits


def register() -> None:
    """Make the weight transfer known; vLLM calls this in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "ramulus_vllm.weights", "FileWeights")
