"""What the machine has to say of a step: memory, and how busy the GPU was."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in the system's unit of resident memory


class Machine:
    """Readings of this process and its GPU; cheap enough for every step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen = device, 0  # `seen`: time stamp of the last sample of the GPU's load, in microseconds
        self.load = gpu_of(device)

    def read(self) -> dict[str, float]:
        """`memory/peak_rss` and, on a GPU, `memory/peak_gpu`: bytes, the most so far; `gpu/busy`: share of the time since the last reading.

        The busy share needs nvidia-ml-py and a GPU that tells it; where one is missing it is left out.
        """
        readings: dict[str, float] = {"memory/peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT}
        if self.device.type == "cuda":
            readings["memory/peak_gpu"] = torch.cuda.max_memory_allocated(self.device)
        if self.load is not None:
            readings |= self.busy()
        return readings

    def busy(self) -> dict[str, float]:
        """The mean of the samples that the driver took since the last reading; {} where there is none."""
        nvml, gpu = self.load
        try:
            _, samples = nvml.nvmlDeviceGetSamples(gpu, nvml.NVML_GPU_UTILIZATION_SAMPLES, self.seen)
        except nvml.NVMLError:  # no sample since then, or a GPU in parts, which tells none
            return {}
        self.seen = max((sample.timeStamp for sample in samples), default=self.seen)
        shares = [sample.sampleValue.uiVal / 100 for sample in samples]
        return {"gpu/busy": sum(shares) / len(shares)} if shares else {}


def gpu_of(device: torch.device) -> Any:
    """(the NVML module, its handle of a GPU); None without a GPU, without nvidia-ml-py, or where the driver does not answer."""
    if device.type != "cuda":
        return None
    try:
        import pynvml as nvml
    except ImportError:  # optional: the share is then not said
        return None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError:
        return None
