"""The pieces several families are made of: convolutions, shortcuts, checkpointed stages."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.catalog.options import ModelOptions
from resnet_dist.models.norm import GhostBatchNorm2d, without_statistics

Norm = Callable[[int], GhostBatchNorm2d]


def norm_of(options: ModelOptions, default_eps: float = 1e-5) -> Norm:
    """What builds a BatchNorm of so many channels, with the chosen group size."""
    return partial(GhostBatchNorm2d, bn_batch=options.bn_batch, momentum=options.bn_momentum,
                   eps=default_eps if options.bn_eps is None else options.bn_eps)


class BlurConv2d(nn.Conv2d):
    """A strided convolution of a blurred input; state dict as nn.Conv2d.

    Source: Zhang 2019 (blur, then subsample); as in the recipes of ffcv-imagenet: binomial 3x3
    filter, zero padding, before the convolution itself.
    """

    def __init__(self, *args: int, **kwargs: int | bool) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(row, row) / 16
        self.register_buffer(
            "blur", kernel.expand(self.in_channels, 1, 3, 3).clone(), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        blur: Tensor = self.blur  # type: ignore[assignment]
        return super().forward(F.conv2d(x, blur.to(x.dtype), padding=1, groups=self.in_channels))


class PixelConv2d(nn.Conv2d):
    """The first convolution of a network; state dict as nn.Conv2d.

    Images may come with channels of zeros behind their own (`kernels.normalize` pads to whole
    vectors): the weights get as many zeros, and their gradient none of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        extra = x.shape[1] - self.in_channels
        if not extra:
            return super().forward(x)
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, extra))
        return self._conv_forward(x, weight, self.bias)


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d by `kernels.max_pool`: square windows, no dilation, no indices."""

    kernel_size: int
    stride: int
    padding: int

    def forward(self, x: Tensor) -> Tensor:
        return kernels.max_pool(x, self.kernel_size, self.stride, self.padding)


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    antialias: bool = False,
) -> nn.Conv2d:
    """A kernel x kernel convolution without bias that keeps the size at stride 1."""
    kind: type[nn.Conv2d] = PixelConv2d if in_channels == 3 else nn.Conv2d
    if antialias and stride > 1:
        kind = BlurConv2d
    return kind(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2,
                groups=groups, bias=False)


class PadShortcut(nn.Module):
    """Option A: take every stride-th pixel, fill the new channels with zeros; no parameters.

    Source: He et al. 2015, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # A pool of one pixel, not a slice: a slice's gradient is NCHW, and would be copied to NHWC.
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))


def projection(
    in_channels: int,
    out_channels: int,
    stride: int,
    norm: Norm,
    *,
    avg_down: bool = False,
    antialias: bool = False,
) -> nn.Sequential:
    """Options B and C: a 1x1 convolution and BatchNorm; ResNet-D pools instead of striding."""
    if not avg_down:
        return nn.Sequential(
            conv(in_channels, out_channels, 1, stride, antialias=antialias), norm(out_channels)
        )
    pool = (nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            if stride > 1 else nn.Identity())
    return nn.Sequential(pool, conv(in_channels, out_channels, 1), norm(out_channels))


class ReluLinear(nn.Linear):
    """A hidden linear layer, whose output is rectified: initialised as the convolutions are."""


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the means of all. Source: Hu et al. 2018."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        middle = max(8, round(channels / reduction / 8) * 8)
        self.fc1 = nn.Conv2d(channels, middle, 1)
        self.fc2 = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Stage(nn.Sequential):
    """Blocks one after the other; with `checkpointing`, only every sqrt(n)-th activation is kept.

    Segments of ceil(sqrt(n)) blocks are computed again in the backward pass, so memory grows with
    the square root of the depth: O(sqrt(n)) kept inputs plus one segment in full.
    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """

    def __init__(self, *blocks: nn.Module, checkpointing: bool = False) -> None:
        super().__init__(*blocks)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self)
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            for block in blocks:
                x = block(x)
            return x
        length = math.ceil(math.sqrt(len(blocks)))
        for start in range(0, len(blocks), length):
            x = checkpointed(nn.Sequential(*blocks[start : start + length]), x)
        return x


def make_stages(block: Callable[[int, int, int, float], nn.Module], expansion: int,
                counts: Sequence[int], planes: Sequence[int], options: ModelOptions) -> list[Stage]:
    """One `Stage` per entry; all but the first halve the size. Drop rates grow linearly.

    Args:
        block: (channels in, planes, stride, drop rate) -> one with `expansion` * planes channels.
    """
    stages, channels, done = [], planes[0], 0
    for index, (count, width) in enumerate(zip(counts, planes, strict=True)):
        blocks = []
        for k in range(count):
            done += 1
            rate = (options.stochastic_depth or 0.0) * done / sum(counts)
            blocks.append(block(channels, width, 2 if k == 0 and index > 0 else 1, rate))
            channels = width * expansion
        stages.append(Stage(*blocks, checkpointing=options.checkpointing))
    return stages


def checkpointed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, keeping only x for the backward pass. BatchNorm statistics count once."""
    return checkpoint(  # no RNG state to keep: layers draw from sample keys
        run, x, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), without_statistics()),
    )


def initialise(model: nn.Module, init: str) -> None:
    """Weights of every convolution and hidden layer, from torch's generator, in network order.

    he_fan_out: normal with variance 2 / (k^2 * out_channels), as published code of residual
    networks; he_fan_in: 2 / (k^2 * in_channels / groups); torch: the library's uniform default.
    The classifier keeps the library's default unless `classifier_std` is given; all other biases
    are zero under the first two.
    Source: He et al. 2015b, section 2.2.
    """
    if init == "torch":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | ReluLinear):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            fan = fan_out if init == "he_fan_out" else fan_in
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
