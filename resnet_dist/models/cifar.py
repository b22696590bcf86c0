"""He et al. 2015 and 2016 on CIFAR: three stages of 16, 32 and 64 planes on 32x32 images.

Basic blocks at depth 6n+2 (20 to 1202), bottlenecks at 9n+2 (164, 1001); plain, original,
pre-activation, and the ablations of 2016.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.catalog.options import SHORTCUT_EXPERIMENTS, ModelOptions
from resnet_dist.models.experiments import GATE_BIAS, ActivationExperiment, ShortcutExperiment
from resnet_dist.models.keyed import KeyedDropout
from resnet_dist.models.layers import Stage, conv, make_stages, norm_of
from resnet_dist.models.preact import BASIC, BOTTLENECK, PreActResNet
from resnet_dist.models.resnet import BasicBlock, BlockConfig, Bottleneck

PLANES = (16, 32, 64)
_BOTTLENECK_DEPTHS = (164, 1001)


class CifarResNet(nn.Module):
    """Images [n, 3, h, w] (published at 32x32) to logits [n, num_classes].

    `final_relu`: the last sum is rectified here, because its block leaves it as it is.
    """

    def __init__(self, stages: list[Stage], out_channels: int, options: ModelOptions, *,
                 final_relu: bool) -> None:
        super().__init__()
        self.conv1 = conv(3, PLANES[0], 3)
        self.bn1 = norm_of(options)(PLANES[0])
        self.layer1, self.layer2, self.layer3 = stages
        self.final_relu = final_relu
        self.dropout = KeyedDropout(options.dropout) if options.dropout else None
        self.fc = nn.Linear(out_channels, options.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = kernels.average_pool(F.relu(x) if self.final_relu else x)
        return self.fc(x if self.dropout is None else self.dropout(x))


def build_cifar(name: str, options: ModelOptions) -> nn.Module:
    """The CIFAR network called `name`."""
    depth = int("".join(c for c in name if c.isdigit()))
    bottleneck = depth in _BOTTLENECK_DEPTHS
    count = (depth - 2) // (9 if bottleneck else 6)
    # Option A everywhere in 2015; the bottlenecks of 2016 project where the shape changes.
    shortcut = options.shortcut or ("B" if bottleneck else "A")
    activation = options.activation or "original"
    if name.startswith("preresnet") or activation == "full_preact":
        return PreActResNet(BOTTLENECK if bottleneck else BASIC, (count,) * 3, PLANES, options,
                            shortcut=shortcut, imagenet=False)

    norm = norm_of(options)
    gate_bias = GATE_BIAS if options.gate_bias is None else options.gate_bias
    config = BlockConfig(
        norm=norm, residual=not name.startswith("plain"), stride_in_1x1=True,
        shortcut="C" if shortcut == "conv1x1" else shortcut,
    )

    def block(in_channels: int, planes: int, stride: int, drop_rate: float) -> nn.Module:
        if activation != "original":
            return ActivationExperiment(in_channels, planes, stride, norm, bottleneck, activation,
                                        shortcut)
        if shortcut in SHORTCUT_EXPERIMENTS and shortcut != "conv1x1":
            return ShortcutExperiment(in_channels, planes, stride, norm, bottleneck, shortcut,
                                      gate_bias)
        kind = Bottleneck if bottleneck else BasicBlock
        return kind(in_channels, planes, stride, config, drop_rate)

    expansion = 4 if bottleneck else 1
    stages = make_stages(block, expansion, (count,) * 3, PLANES, options)
    return CifarResNet(stages, expansion * PLANES[-1], options,
                       final_relu=activation == "relu_only_preact")
