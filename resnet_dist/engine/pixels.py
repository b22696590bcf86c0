"""Pixels to what a network takes, and back: the one way of training, validation and `eval`.

In: uint8 images on the device. Out: normalised images there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resnet_dist.kernels import dispatch as kernels

Normalization = tuple[np.ndarray, np.ndarray]


class Pixels:
    """Normalises images on `device`; equal images become equal bits, whoever asks.

    Args:
        normalization: float32 (mean, 1 / std), broadcastable to [n, 3, h, w], for x / 255.
    """

    def __init__(self, normalization: Normalization, device: torch.device) -> None:
        mean, inv_std = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)).to(device)
                         for part in normalization)
        self._shift, self._scale = -mean * inv_std, inv_std / 255

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [n, S, S, 3] on the device -> [n, 3, S, S] in channels_last memory.

        On GPUs with a fourth channel of zeros, which `PixelConv2d` knows to ignore.
        """
        return kernels.normalize(images, self._scale, self._shift, dtype)

    def restore(self, x: Tensor) -> Tensor:
        """What `normalize` did, undone: float32 [n, 3 or 4, S, S] -> uint8 [n, S, S, 3]."""
        shown = (x[:, :3] - self._shift) / self._scale
        return shown.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
