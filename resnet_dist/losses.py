"""What is minimised and what is counted, from logits and labels. Never synchronises the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many images have their label as the best, and among the best five, of the classes.

    logits float [n, classes], labels int64 [n]; both results are float32 scalars on the device.
    Equal logits rank by class index, as a stable sort does, so bf16's many ties count the same on
    every device. An image whose logits are not numbers is wrong.
    """
    target = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead = ~(logits <= target) | ((logits == target) & earlier)
    place = ahead.sum(1)
    return (place < 1).sum().float(), (place < 5).sum().float()


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the images: a float32 scalar."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")
