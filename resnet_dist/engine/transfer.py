"""Copies between host and device: batches there, named tensors back, a saved state in."""

from __future__ import annotations

import torch
from torch import Tensor


class Upload:
    """Copies batches to the device beside what it computes.

    On GPUs on a stream of its own: a batch travels while the step before it still runs, if its
    memory is pinned. Elsewhere a tensor stays where it is or is copied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, ready for the current stream; does not wait for the copy."""
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = tensor.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        there.record_stream(current)  # the memory is not given away before the step has read it
        return there


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
