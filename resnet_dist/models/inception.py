"""Szegedy et al. 2016: Inception-v4 and Inception-ResNet-v2.

Inception-v4 follows figures 3 to 9. Inception-ResNet-v2 is the network whose weights the authors
released, which everyone means by the name: the stem of Inception-v3, 10 + 20 + 10 residual modules
(the paper draws the stem of v4 and 5 + 10 + 5). State dicts have timm's names and shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.keyed import KeyedDropout
from resnet_dist.models.layers import MaxPool2d, Norm, PixelConv2d, Stage, norm_of

BN_EPS = 1e-3  # of the released weights
DROPOUT = 0.2  # section 3.4 of the paper keeps 0.8
Kernel = int | tuple[int, int]
# One convolution: output channels, kernel and, in reductions, stride.
Spec = tuple[int, Kernel] | tuple[int, Kernel, int]


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU. `same` pads so that stride 1 keeps the size."""

    def __init__(self, norm: Norm, in_channels: int, out_channels: int, kernel: Kernel,
                 stride: int = 1, same: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
        kind = PixelConv2d if in_channels == 3 else nn.Conv2d
        self.conv = kind(in_channels, out_channels, sides, stride=stride, padding=padding,
                         bias=False)
        self.bn = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), relu=True)


class Branches(nn.Module):
    """Named branches side by side, concatenated over channels in the order given."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class Builder:
    """Writes the paper's figures as chains of (channels, kernel[, stride])."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def one(self, in_channels: int, spec: Spec) -> ConvNorm:
        out_channels, kernel, stride = (*spec, 1)[:3]
        # Only the reductions stride, and they do not pad.
        return ConvNorm(self.norm, in_channels, out_channels, kernel, stride, same=stride == 1)

    def valid(self, in_channels: int, out_channels: int, kernel: int) -> ConvNorm:
        return ConvNorm(self.norm, in_channels, out_channels, kernel, same=False)

    def chain(self, in_channels: int, *specs: Spec) -> nn.Sequential:
        layers = []
        for spec in specs:
            layers.append(self.one(in_channels, spec))
            in_channels = spec[0]
        return nn.Sequential(*layers)

    def pooled(self, in_channels: int, out_channels: int) -> nn.Sequential:
        pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        return nn.Sequential(pool, self.one(in_channels, (out_channels, 1)))


def _maxpool() -> MaxPool2d:
    return MaxPool2d(3, stride=2)


class InceptionC(nn.Module):
    """The 8x8 module, whose branches fork at their ends. Source: figure 6."""

    def __init__(self, b: Builder) -> None:
        super().__init__()
        self.branch0 = b.one(1536, (256, 1))
        self.branch1_0 = b.one(1536, (384, 1))
        self.branch1_1a = b.one(384, (256, (1, 3)))
        self.branch1_1b = b.one(384, (256, (3, 1)))
        self.branch2_0 = b.one(1536, (384, 1))
        self.branch2_1 = b.one(384, (448, (3, 1)))
        self.branch2_2 = b.one(448, (512, (1, 3)))
        self.branch2_3a = b.one(512, (256, (1, 3)))
        self.branch2_3b = b.one(512, (256, (3, 1)))
        self.branch3 = b.pooled(1536, 256)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1_0(x)
        two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        return torch.cat([
            self.branch0(x), self.branch1_1a(one), self.branch1_1b(one),
            self.branch2_3a(two), self.branch2_3b(two), self.branch3(x),
        ], dim=1)


class InceptionV4(nn.Module):
    """Images [n, 3, h, w] (published at 299x299, at least 75) to logits [n, num_classes]."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        b = Builder(norm_of(options, BN_EPS))
        seven = ((1, 7), (7, 1))
        stem = [
            b.one(3, (32, 3, 2)), b.valid(32, 32, 3), b.one(32, (64, 3)),
            Branches(maxpool=_maxpool(), conv=b.one(64, (96, 3, 2))),
            Branches(
                branch0=nn.Sequential(b.one(160, (64, 1)), b.valid(64, 96, 3)),
                branch1=nn.Sequential(b.one(160, (64, 1)), b.one(64, (64, seven[0])),
                                      b.one(64, (64, seven[1])), b.valid(64, 96, 3)),
            ),
            Branches(conv=b.one(192, (192, 3, 2)), maxpool=_maxpool()),
        ]
        a = [Branches(branch0=b.one(384, (96, 1)),
                      branch1=b.chain(384, (64, 1), (96, 3)),
                      branch2=b.chain(384, (64, 1), (96, 3), (96, 3)),
                      branch3=b.pooled(384, 96)) for _ in range(4)]
        reduction_a = Branches(branch0=b.one(384, (384, 3, 2)),
                               branch1=b.chain(384, (192, 1), (224, 3), (256, 3, 2)),
                               branch2=_maxpool())
        seventeen = [
            Branches(branch0=b.one(1024, (384, 1)),
                     branch1=b.chain(1024, (192, 1), (224, seven[0]), (256, seven[1])),
                     branch2=b.chain(1024, (192, 1), (192, seven[1]), (224, seven[0]),
                                     (224, seven[1]), (256, seven[0])),
                     branch3=b.pooled(1024, 128)) for _ in range(7)
        ]
        reduction_b = Branches(branch0=b.chain(1024, (192, 1), (192, 3, 2)),
                               branch1=b.chain(1024, (256, 1), (256, seven[0]), (320, seven[1]),
                                               (320, 3, 2)),
                               branch2=_maxpool())
        c = [InceptionC(b) for _ in range(3)]
        self.features = Stage(*stem, *a, reduction_a, *seventeen, reduction_b, *c,
                              checkpointing=options.checkpointing)
        self.dropout = KeyedDropout(DROPOUT if options.dropout is None else options.dropout)
        self.last_linear = nn.Linear(1536, options.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_linear(self.dropout(kernels.average_pool(self.features(x))))


class ResidualInception(nn.Module):
    """relu(x + scale * 1x1(branches(x))). Source: figures 16 to 19 and section 3.3 (scaling)."""

    def __init__(self, channels: int, scale: float, relu: bool, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.branches = tuple(branches)
        last = [[m for m in branch.modules() if isinstance(m, nn.Conv2d)][-1]
                for branch in branches.values()]
        self.conv2d = nn.Conv2d(sum(m.out_channels for m in last), channels, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([getattr(self, name)(x) for name in self.branches], dim=1)
        out = self.conv2d(joined) * self.scale + x
        return F.relu(out) if self.relu else out


class InceptionResNetV2(nn.Module):
    """Images [n, 3, h, w] (published at 299x299, at least 75) to logits [n, num_classes]."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        b = Builder(norm_of(options, BN_EPS))
        self.conv2d_1a = b.one(3, (32, 3, 2))
        self.conv2d_2a = b.valid(32, 32, 3)
        self.conv2d_2b = b.one(32, (64, 3))
        self.maxpool_3a = _maxpool()
        self.conv2d_3b = b.one(64, (80, 1))
        self.conv2d_4a = b.valid(80, 192, 3)
        self.maxpool_5a = _maxpool()
        self.mixed_5b = Branches(branch0=b.one(192, (96, 1)),
                                 branch1=b.chain(192, (48, 1), (64, 5)),
                                 branch2=b.chain(192, (64, 1), (96, 3), (96, 3)),
                                 branch3=b.pooled(192, 64))
        self.repeat = self._stage(options, [ResidualInception(
            320, 0.17, True, branch0=b.one(320, (32, 1)), branch1=b.chain(320, (32, 1), (32, 3)),
            branch2=b.chain(320, (32, 1), (48, 3), (64, 3))) for _ in range(10)])
        self.mixed_6a = Branches(branch0=b.one(320, (384, 3, 2)),
                                 branch1=b.chain(320, (256, 1), (256, 3), (384, 3, 2)),
                                 branch2=_maxpool())
        self.repeat_1 = self._stage(options, [ResidualInception(
            1088, 0.10, True, branch0=b.one(1088, (192, 1)),
            branch1=b.chain(1088, (128, 1), (160, (1, 7)), (192, (7, 1)))) for _ in range(20)])
        self.mixed_7a = Branches(branch0=b.chain(1088, (256, 1), (384, 3, 2)),
                                 branch1=b.chain(1088, (256, 1), (288, 3, 2)),
                                 branch2=b.chain(1088, (256, 1), (288, 3), (320, 3, 2)),
                                 branch3=_maxpool())
        eights = [ResidualInception(
            2080, 0.20 if k < 9 else 1.0, k < 9, branch0=b.one(2080, (192, 1)),
            branch1=b.chain(2080, (192, 1), (224, (1, 3)), (256, (3, 1)))) for k in range(10)]
        self.repeat_2 = self._stage(options, eights[:9])
        self.block8 = eights[9]
        self.conv2d_7b = b.one(2080, (1536, 1))
        self.dropout = KeyedDropout(DROPOUT if options.dropout is None else options.dropout)
        self.classif = nn.Linear(1536, options.num_classes)

    @staticmethod
    def _stage(options: ModelOptions, blocks: list[ResidualInception]) -> Stage:
        return Stage(*blocks, checkpointing=options.checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool_3a(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))))
        x = self.maxpool_5a(self.conv2d_4a(self.conv2d_3b(x)))
        x = self.repeat(self.mixed_5b(x))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.block8(self.repeat_2(self.mixed_7a(x)))
        return self.classif(self.dropout(kernels.average_pool(self.conv2d_7b(x))))


def build_inception(name: str, options: ModelOptions) -> nn.Module:
    """inception_v4 or inception_resnet_v2."""
    return InceptionV4(options) if name == "inception_v4" else InceptionResNetV2(options)
