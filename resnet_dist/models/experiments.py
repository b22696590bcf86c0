"""He et al. 2016, the ablations: five shortcuts (table 1), three activation placements (table 2).

The other two placements, original and full pre-activation, are families of their own. All are CIFAR
networks with 16, 32 and 64 planes and drop into `CifarResNet` as blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.keyed import KeyedDropout
from resnet_dist.models.layers import Norm, PadShortcut, conv
from resnet_dist.models.norm import GhostBatchNorm2d
from resnet_dist.models.resnet import BlockConfig

# Source: table 1, the settings that trained: shortcut and branch scaled by 0.5; gates that start
# with bias -6; dropout 0.5 (which failed to converge; kept as published).
CONSTANT_SCALE = 0.5
GATE_BIAS = -6.0
SHORTCUT_DROPOUT = 0.5


class _Branch(nn.Module):
    """The convolutions and norms of one block: two 3x3, or 1x1, 3x3, 1x1."""

    def __init__(self, in_channels: int, planes: int, stride: int, norm: Norm,
                 bottleneck: bool) -> None:
        super().__init__()
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = [in_channels, *[planes] * (len(kernels) - 1), planes * (4 if bottleneck else 1)]
        self.convs = nn.ModuleList(
            conv(widths[k], widths[k + 1], kernel, stride if k == 0 else 1)
            for k, kernel in enumerate(kernels)
        )
        self.bns = nn.ModuleList(norm(width) for width in widths[1:])
        self.out_channels = widths[-1]

    def last_bn(self) -> GhostBatchNorm2d:
        return self.bns[-1]  # type: ignore[return-value]


class ShortcutExperiment(_Branch):
    """An original unit, relu(a(x) * shortcut(x) + b(x) * branch(x)), on every block.

    constant_scaling: a = b = 0.5. exclusive_gating: a = 1 - g(x), b = g(x). shortcut_only_gating:
    a = 1 - g(x), b = 1. dropout: a drops elements. g is the sigmoid of a 1x1 convolution of x.
    (conv1x1, the fifth, is option C.) Where the shape changes, the identity becomes option A.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, norm: Norm, bottleneck: bool,
                 experiment: str, gate_bias: float) -> None:
        super().__init__(in_channels, planes, stride, norm, bottleneck)
        self.experiment = experiment
        self.identity = PadShortcut(in_channels, self.out_channels, stride)
        self.gate = None
        if "gating" in experiment:
            self.gate = nn.Conv2d(in_channels, self.out_channels, 1, stride=stride)
            self.gate_bias = gate_bias
        self.dropout = KeyedDropout(SHORTCUT_DROPOUT) if experiment == "dropout" else None

    def initialise_gate(self) -> None:
        if self.gate is not None and self.gate.bias is not None:
            nn.init.constant_(self.gate.bias, self.gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for convolution, bn in zip(self.convs[:-1], self.bns[:-1], strict=True):
            out = bn(convolution(out), relu=True)
        out, shortcut = self.bns[-1](self.convs[-1](out)), self.identity(x)
        if self.experiment == "constant_scaling":
            return F.relu(CONSTANT_SCALE * (out + shortcut))
        if self.dropout is not None:
            return F.relu(out + self.dropout(shortcut))
        assert self.gate is not None
        gate = torch.sigmoid(self.gate(x))
        branch = gate * out if self.experiment == "exclusive_gating" else out
        return F.relu(branch + (1 - gate) * shortcut)


class ActivationExperiment(_Branch):
    """Figure 4 (b) to (d): where BatchNorm and ReLU stand around the convolutions.

    bn_after_add: the sum is normalised, then rectified. relu_before_add: the branch ends in ReLU.
    relu_only_preact: ReLU before, BatchNorm after each convolution. Projections that change the
    shape carry BatchNorm, except under bn_after_add, whose norm follows the sum.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, norm: Norm, bottleneck: bool,
                 activation: str, shortcut: str) -> None:
        super().__init__(in_channels, planes, stride, norm, bottleneck)
        self.activation = activation
        config = BlockConfig(norm=norm, shortcut=shortcut)
        self.downsample = config.make_shortcut(in_channels, self.out_channels, stride)
        if activation == "bn_after_add" and isinstance(self.downsample, nn.Sequential):
            self.downsample = self.downsample[0]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = x
        if self.activation == "relu_only_preact":
            for convolution, bn in zip(self.convs[:-1], self.bns[:-1], strict=True):
                out = bn(convolution(F.relu(out)))
            return self.bns[-1](self.convs[-1](F.relu(out)), residual=shortcut)
        for convolution, bn in zip(self.convs[:-1], self.bns[:-1], strict=True):
            out = bn(convolution(out), relu=True)
        out = self.convs[-1](out)
        if self.activation == "bn_after_add":
            return self.bns[-1](out + shortcut, relu=True)
        return self.bns[-1](out, relu=True) + shortcut
