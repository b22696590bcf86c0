"""He et al. 2016: full pre-activation. BatchNorm and ReLU come before each convolution.

The first activation follows the stem, before the first block splits; the first block has none of
its own. A block that changes the shape projects its *activated* input, without BatchNorm; the last
sum is normalised and rectified before pooling. Strides are in the first convolution, as in the
authors' code.
"""

from functools import partial

from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.keyed import KeyedDropout, StochasticDepth
from resnet_dist.models.layers import MaxPool2d, Norm, PadShortcut, conv, make_stages, norm_of
from resnet_dist.models.resnet import STAGES

Kernels = tuple[int, ...]
BASIC: Kernels = (3, 3)
BOTTLENECK: Kernels = (1, 3, 1)


class PreActBlock(nn.Module):
    """x + conv(relu(bn(... conv(relu(bn(x)))))). Source: He et al. 2016, figure 1b and 4e.

    Args:
        kernels: (3, 3) or (1, 3, 1); the bottleneck's last convolution has 4 * planes channels.
        shortcut: "A", "B" or "C", where the shape changes (C: everywhere).
    """

    def __init__(self, in_channels: int, planes: int, stride: int, drop_rate: float = 0.0, *,
                 kernels: Kernels, norm: Norm, shortcut: str) -> None:
        super().__init__()
        out_channels = planes * (4 if kernels == BOTTLENECK else 1)
        widths = [in_channels, *[planes] * (len(kernels) - 1), out_channels]
        self.bn1: nn.Module | None = norm(in_channels)  # None: x is activated already
        self.conv1 = conv(in_channels, widths[1], kernels[0], stride)
        self.bn2 = norm(widths[1])
        self.conv2 = conv(widths[1], widths[2], kernels[1])
        self.bn3 = norm(widths[2]) if len(kernels) == 3 else None
        self.conv3 = conv(widths[2], widths[3], kernels[2]) if len(kernels) == 3 else None
        self.drop = StochasticDepth(drop_rate) if drop_rate else None
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels or shortcut == "C":
            self.downsample = (PadShortcut(in_channels, out_channels, stride) if shortcut == "A"
                               else conv(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.bn1 is None else self.bn1(x, relu=True)
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = self.conv2(self.bn2(self.conv1(activated), relu=True))
        if self.bn3 is not None and self.conv3 is not None:
            out = self.conv3(self.bn3(out, relu=True))
        return shortcut + (out if self.drop is None else self.drop(out))


class PreActResNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]; `imagenet`: 7x7 stem and max-pooling."""

    def __init__(self, kernels: Kernels, counts: tuple[int, ...], planes: tuple[int, ...],
                 options: ModelOptions, *, shortcut: str, imagenet: bool) -> None:
        super().__init__()
        norm, channels = norm_of(options), planes[0]
        self.conv1 = conv(3, channels, 7, 2) if imagenet else conv(3, channels, 3)
        self.bn1 = norm(channels)
        self.maxpool = MaxPool2d(3, stride=2, padding=1) if imagenet else None
        expansion = 4 if kernels == BOTTLENECK else 1
        stages = make_stages(partial(PreActBlock, kernels=kernels, norm=norm, shortcut=shortcut),
                             expansion, counts, planes, options)
        stages[0][0].register_module("bn1", None)  # the stem's own activation is before it
        self.layers = nn.Sequential(*stages)
        channels = planes[-1] * expansion
        self.bn_last = norm(channels)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else None
        self.fc = nn.Linear(channels, options.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        x = x if self.maxpool is None else self.maxpool(x)
        x = kernels.average_pool(self.bn_last(self.layers(x), relu=True))
        return self.fc(x if self.dropout is None else self.dropout(x))


def build_preact(name: str, options: ModelOptions) -> PreActResNet:
    """The ImageNet network called `name`."""
    counts = STAGES[int(name.removeprefix("preresnet"))]
    return PreActResNet(BOTTLENECK, counts, (64, 128, 256, 512), options,
                        shortcut=options.shortcut or "B", imagenet=True)
