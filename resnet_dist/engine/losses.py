"""What is minimised and what is counted, from logits and targets. Never synchronises the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_dist.config.schema import LossConfig
from resnet_dist.data.augmentation.mix import Targets


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
    numbers = torch.isfinite(target[:, 0])
    return ((place < 1) & numbers).sum().float(), ((place < 5) & numbers).sum().float()


def loss_sum(logits: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    """The configured loss summed over the images: a float32 scalar.

    cross_entropy: smoothing gives every class label_smoothing / classes of the target (Szegedy et
    al. 2015, sec. 7). bce: binary cross-entropy of every class, averaged over classes
    (Wightman et al. 2021, sec. 2.1).
    """
    logits = logits.float()
    if loss.name == "bce":
        aims = class_weights(targets, logits.shape[1], loss.label_smoothing)
        if loss.threshold is not None:
            aims = (aims > loss.threshold).float()
        return F.binary_cross_entropy_with_logits(logits, aims, reduction="none").mean(1).sum()
    if targets.partners is None or targets.weights is None:
        return F.cross_entropy(logits, targets.labels, reduction="sum",
                               label_smoothing=loss.label_smoothing)
    first, second = (F.cross_entropy(logits, labels, reduction="none",
                                     label_smoothing=loss.label_smoothing)
                     for labels in (targets.labels, targets.partners))
    return (targets.weights * first + (1 - targets.weights) * second).sum()


def class_weights(targets: Targets, classes: int, smoothing: float) -> Tensor:
    """float32 [n, classes], rows that sum to 1: mixed first, then smoothed."""
    weights = F.one_hot(targets.labels, classes).float()
    if targets.partners is not None and targets.weights is not None:
        partners = F.one_hot(targets.partners, classes).float()
        weights = torch.lerp(partners, weights, targets.weights[:, None])
    return weights * (1 - smoothing) + smoothing / classes
