"""Simonyan and Zisserman 2015: VGG-16 (configuration D) and VGG-19 (E), with and without BatchNorm.

State dicts have torchvision's names and shapes.
"""

from torch import Tensor, nn

from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.keyed import KeyedDropout
from resnet_dist.models.layers import MaxPool2d, PixelConv2d, ReluLinear, Stage, norm_of

PLANES = (64, 128, 256, 512, 512)
# Convolutions per stage. Source: table 1.
STAGES = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
DROPOUT = 0.5  # section 3.1, after both hidden layers


class VGG(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]; sizes other than 224 are pooled to 7x7."""

    def __init__(self, counts: tuple[int, ...], batch_norm: bool, options: ModelOptions) -> None:
        super().__init__()
        norm, channels = norm_of(options), 3
        layers: list[nn.Module] = []
        for count, planes in zip(counts, PLANES, strict=True):
            for _ in range(count):
                kind = PixelConv2d if channels == 3 else nn.Conv2d
                layers.append(kind(channels, planes, 3, padding=1))
                if batch_norm:
                    layers.append(norm(planes))
                layers.append(nn.ReLU())  # not in place: a checkpointed segment may begin here
                channels = planes
            layers.append(MaxPool2d(2))
        self.features = Stage(*layers, checkpointing=options.checkpointing)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        rate = DROPOUT if options.dropout is None else options.dropout
        self.classifier = nn.Sequential(
            ReluLinear(channels * 49, 4096), nn.ReLU(), KeyedDropout(rate),
            ReluLinear(4096, 4096), nn.ReLU(), KeyedDropout(rate),
            nn.Linear(4096, options.num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def build_vgg(name: str, options: ModelOptions) -> VGG:
    """The network called `name`: vgg16, vgg19, vgg16_bn or vgg19_bn."""
    return VGG(STAGES[int(name[3:5])], name.endswith("_bn"), options)
