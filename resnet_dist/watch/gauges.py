"""Memory and utilisation of this rank's device and host process: what the driver and kernel say.

Nothing here waits for the device.
"""

from __future__ import annotations

import logging

import psutil
import torch

log = logging.getLogger(__name__)

_GB = 1e9


class Gauges:
    """Readings of one rank.

    Args:
        device: where it computes; a CPU has no readings of its own beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._utilisation = device.type == "cuda"

    def read(self) -> dict[str, float]:
        """host_memory_gb of this process; on a GPU gpu_memory_gb now, gpu_memory_peak_gb since the
        last call, gpu_memory_reserved_gb, and gpu_percent, the share of the last second or so in
        which a kernel ran."""
        values = {"host_memory_gb": self._process.memory_info().rss / _GB}
        if self._device.type == "cuda":
            values |= {
                "gpu_memory_gb": torch.cuda.memory_allocated(self._device) / _GB,
                "gpu_memory_peak_gb": torch.cuda.max_memory_allocated(self._device) / _GB,
                "gpu_memory_reserved_gb": torch.cuda.memory_reserved(self._device) / _GB}
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._utilisation:
            try:
                values["gpu_percent"] = float(torch.cuda.utilization(self._device))
            except Exception as error:  # NVML's errors have no common base but this
                self._utilisation = False
                log.warning("GPU utilisation is not recorded: %s", " ".join(str(error).split()))
        return values
