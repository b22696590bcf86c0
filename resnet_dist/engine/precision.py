"""In which precision a device computes convolutions and matrix products.

In: `precision` of a configuration and a device. Out: the dtype for autocast, None for float32.
Weights, BatchNorm statistics and optimizers are float32 throughout.

`precision=auto` is bf16 where the device has instructions for it, fp16 with loss scaling on older
GPUs, and fp32 on CPUs without: there every bf16 product is emulated (ResNet-20 on two cores with
AVX2: 28 images/s in bf16, RESULTS.md has fp32's). A run keeps what it began with, whatever nodes it
goes on: `settled` takes it from the checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from resnet_dist.config.schema import Config
from resnet_dist.ranks.distributed import World, agree_max

log = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def native(device: torch.device) -> str:
    """What `auto` means on `device`: bf16, fp16 or fp32."""
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
        return "bf16" if bf16 else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 in hardware: AVX-512 BF16, AMX or Arm's."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.machine() == "arm64"
    flags = {word for line in lines if line.startswith(("flags", "Features"))
             for word in line.split(":", 1)[1].split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def precision_of(config: Config, device: torch.device) -> str:
    """bf16, fp16, tf32 or fp32."""
    return native(device) if config.precision == "auto" else config.precision


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """None: no autocast, float32."""
    return AUTOCAST_DTYPES.get(precision_of(config, device))


def settled(config: Config, world: World, checkpoint: dict[str, Any] | None) -> Config:
    """`config` with the precision of the run: the checkpoint's, else what every rank's device has.

    Args:
        checkpoint: meta of the one to go on from.

    Collective.
    """
    if config.precision == "auto":
        before = checkpoint["config"].get("precision", "auto") if checkpoint else "auto"
        own = native(world.device)
        rank_of = ("bf16", "fp16", "fp32")  # the least able device decides
        chosen = rank_of[agree_max(rank_of.index(own), world)] if before == "auto" else before
        config = dataclasses.replace(config, precision=chosen)  # type: ignore[arg-type]
    if world.device.type == "cpu" and config.precision == "bf16" and not cpu_has_bf16():
        log.warning("precision = bf16: this CPU has no instructions for it and emulates them, "
                    "10 to 30 times slower; precision=fp32 starts a fast run")
    return config
