"""Copies of named tensors: from the device to the host, and from a saved state back."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous copies on the CPU; one wait for the device however many tensors."""
    on_device = any(value.is_cuda for value in tensors.values())
    copies = {}
    for name, value in tensors.items():
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies[name] = host.copy_(value, non_blocking=True)
    if on_device:
        torch.cuda.current_stream().synchronize()
    return copies


@torch.no_grad()
def copy_into(own: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy `saved` into `own` by name. Raises: ValueError naming what does not match."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [f"{name}: {tuple(saved[name].shape)} saved, {tuple(own[name].shape)} here"
              for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if missing or unknown or shapes:
        raise ValueError(f"{what} state does not fit: missing {missing[:3]} ({len(missing)}), "
                         f"unknown {unknown[:3]} ({len(unknown)}), shapes {shapes[:3]}")
    for name, value in own.items():
        value.copy_(saved[name])
