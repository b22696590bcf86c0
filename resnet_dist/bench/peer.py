"""What a user would write with torch alone: the network in torch's own modules."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.build import build_model
from resnet_dist.models.norm import GhostBatchNorm2d


class _BatchNorm(nn.BatchNorm2d):
    """torch's own where the model calls for ours."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


def plain_model(name: str, num_classes: int) -> nn.Module:
    """The network in torch's modules alone."""
    model = build_model(name, num_classes=num_classes)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, GhostBatchNorm2d):
                setattr(module, child_name, _BatchNorm(child.num_features, eps=child.eps))
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, child_name, nn.MaxPool2d(child.kernel_size, child.stride,
                                                         child.padding))
    return model


def classes(size: int) -> int:
    """Of made-up images of so many pixels: ImageNet's or CIFAR's."""
    return 1000 if size > 64 else 10
