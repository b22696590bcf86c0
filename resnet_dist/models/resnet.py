"""He et al. 2015 on ImageNet, and what grew from the same blocks.

Plain and residual 18/34, bottleneck 50 to 200 in v1 (stride in the first 1x1, as published) and
v1.5 (stride in the 3x3), ResNeXt, Wide ResNet, ResNet-D, anti-aliased and squeeze-and-excitation
variants. State dicts have torchvision's names and shapes; those of the D and SE variants timm's.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.keyed import KeyedDropout, StochasticDepth
from resnet_dist.models.layers import (
    MaxPool2d,
    Norm,
    PadShortcut,
    SqueezeExcitation,
    conv,
    make_stages,
    norm_of,
    projection,
)
from resnet_dist.models.norm import GhostBatchNorm2d

# Blocks per stage. Source: He et al. 2015, table 1; 200: He et al. 2016, appendix.
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
PLANES = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the blocks of one network share."""

    norm: Norm
    residual: bool = True
    shortcut: str = "B"
    stride_in_1x1: bool = False
    groups: int = 1
    base_width: int = 64
    avg_down: bool = False
    antialias: bool = False
    se_reduction: int | None = None

    def make_shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
        """The module on the shortcut, None where it is the identity (or there is none)."""
        changes = stride != 1 or in_channels != out_channels
        if not self.residual or (not changes and self.shortcut != "C"):
            return None
        if self.shortcut == "A":
            return PadShortcut(in_channels, out_channels, stride)
        return projection(in_channels, out_channels, stride, self.norm, avg_down=self.avg_down,
                          antialias=self.antialias)


class _Block(nn.Module):
    """The end of every block: last BatchNorm, gate, stochastic depth, addition, ReLU."""

    def complete(self, config: BlockConfig, in_channels: int, out_channels: int, stride: int,
                 drop_rate: float) -> None:
        self.se = (SqueezeExcitation(out_channels, config.se_reduction)
                   if config.se_reduction else None)
        self.drop = StochasticDepth(drop_rate) if drop_rate else None
        self.downsample = config.make_shortcut(in_channels, out_channels, stride)
        self.residual = config.residual

    def shortcut(self, x: Tensor) -> Tensor | None:
        if not self.residual:
            return None
        x = kernels.again(x)
        return x if self.downsample is None else self.downsample(x)

    def join(self, branch: Tensor, last_bn: GhostBatchNorm2d, shortcut: Tensor | None) -> Tensor:
        if self.se is None and self.drop is None:
            return last_bn(branch, residual=shortcut, relu=True)
        branch = last_bn(branch)
        branch = branch if self.se is None else self.se(branch)
        branch = branch if self.drop is None else self.drop(branch)
        return F.relu(branch if shortcut is None else branch + shortcut)


class BasicBlock(_Block):
    """Two 3x3 convolutions. Source: He et al. 2015, figure 5 left."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, config: BlockConfig,
                 drop_rate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, planes, 3, stride, antialias=config.antialias)
        self.bn1 = config.norm(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = config.norm(planes)
        self.complete(config, in_channels, planes, stride, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        return self.join(self.conv2(out), self.bn2, self.shortcut(x))

    def last_bn(self) -> GhostBatchNorm2d:
        return self.bn2


class Bottleneck(_Block):
    """1x1 down, 3x3 (grouped in ResNeXt), 1x1 up. Source: He et al. 2015, figure 5 right."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, config: BlockConfig,
                 drop_rate: float = 0.0) -> None:
        super().__init__()
        width = planes * config.base_width // 64 * config.groups
        out_channels = planes * self.expansion
        first, middle = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, first, antialias=config.antialias)
        self.bn1 = config.norm(width)
        self.conv2 = conv(width, width, 3, middle, config.groups, config.antialias)
        self.bn2 = config.norm(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = config.norm(out_channels)
        self.complete(config, in_channels, out_channels, stride, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        return self.join(self.conv3(out), self.bn3, self.shortcut(x))

    def last_bn(self) -> GhostBatchNorm2d:
        return self.bn3


class ResNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...],
                 config: BlockConfig, options: ModelOptions, stem: str = "conv7") -> None:
        super().__init__()
        self.conv1 = _deep_stem(config.norm) if stem == "deep" else conv(3, 64, 7, 2)
        self.bn1 = config.norm(64)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            lambda channels, width, stride, rate: block(channels, width, stride, config, rate),
            block.expansion, counts, PLANES, options)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else None
        self.fc = nn.Linear(512 * block.expansion, options.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = kernels.average_pool(x)
        return self.fc(x if self.dropout is None else self.dropout(x))


def _deep_stem(norm: Norm) -> nn.Sequential:
    """Three 3x3 instead of the 7x7. Source: He T. et al. 2019, figure 2b."""
    return nn.Sequential(conv(3, 32, 3, 2), norm(32), nn.ReLU(inplace=True),
                         conv(32, 32, 3), norm(32), nn.ReLU(inplace=True), conv(32, 64, 3))


# Groups and width of the 3x3 per 64 planes, by what follows the depth in the name.
_GROUPS_AND_WIDTH = {"_32x4d": (32, 4), "_32x8d": (32, 8), "_64x4d": (64, 4), "_2": (1, 128)}


def build_resnet(name: str, options: ModelOptions) -> ResNet:
    """The ImageNet network called `name`; options override what the name implies."""
    start = next(i for i, character in enumerate(name) if character.isdigit())
    prefix, rest = name[:start], name[start:]
    depth = int(rest[: 3 if rest[:3].isdigit() else 2])
    suffix = rest[len(str(depth)) :]
    groups, base_width = _GROUPS_AND_WIDTH.get(suffix, (1, 64))

    def choose(option: str, implied: object) -> object:
        value = getattr(options, option)
        return implied if value is None else value

    deep = suffix == "d"
    config = BlockConfig(
        norm=norm_of(options),
        residual=prefix != "plain",
        shortcut=str(choose("shortcut", "B")),
        stride_in_1x1=suffix == "_v1",
        groups=groups,
        base_width=base_width,
        avg_down=bool(choose("avg_down", deep)),
        antialias=bool(choose("antialias", suffix == "_blur")),
        se_reduction=options.se_reduction or (16 if prefix == "seresnet" else None),
    )
    stem = str(choose("stem", "deep" if deep else "conv7"))
    return ResNet(BasicBlock if depth < 50 else Bottleneck, STAGES[depth], config, options, stem)
