"""He et al. 2015 and 2016 on CIFAR: three stages of 16, 32 and 64 planes on 32x32 images.

Basic blocks at depth 6n+2 (20 to 1202), bottlenecks at 9n+2 (164, 1001); plain, original and
pre-activation.
"""

from torch import Tensor, nn

from resnet_dist.models.keyed import KeyedDropout
from resnet_dist.models.layers import conv, norm_of
from resnet_dist.models.options import ModelOptions
from resnet_dist.models.resnet import BasicBlock, BlockConfig, Bottleneck, make_stages

_BOTTLENECK_DEPTHS = (164, 1001)


class CifarResNet(nn.Module):
    """Images [n, 3, h, w] (published at 32x32) to logits [n, num_classes]."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks_per_stage: int,
        config: BlockConfig,
        options: ModelOptions,
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        self.bn1 = config.norm(16)
        self.layer1, self.layer2, self.layer3 = make_stages(
            block, (blocks_per_stage,) * 3, (16, 32, 64), 16, config,
            stochastic_depth=options.stochastic_depth or 0.0, checkpointing=options.checkpointing,
        )
        self.dropout = KeyedDropout(options.dropout) if options.dropout else None
        self.fc = nn.Linear(64 * block.expansion, options.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = x.mean((2, 3))
        return self.fc(x if self.dropout is None else self.dropout(x))


def build_cifar(name: str, options: ModelOptions) -> nn.Module:
    """The CIFAR network called `name`."""
    depth = int("".join(c for c in name if c.isdigit()))
    bottleneck = depth in _BOTTLENECK_DEPTHS
    # Option A everywhere in 2015; the bottlenecks of 2016 project where the shape changes.
    shortcut = options.shortcut or ("B" if bottleneck else "A")
    config = BlockConfig(norm=norm_of(options), residual=not name.startswith("plain"),
                         shortcut=shortcut)
    block = Bottleneck if bottleneck else BasicBlock
    return CifarResNet(block, (depth - 2) // (9 if bottleneck else 6), config, options)
