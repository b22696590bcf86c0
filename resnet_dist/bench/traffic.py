"""Bytes and multiply-adds of one training step, counted from the network itself.

In: a model on the meta device. Out: one `Kernel` for each kernel that a step needs, at two levels:
`eager`, where BatchNorm, addition and ReLU are kernels of their own and max-pooling keeps int64
indices; `fused`, where they are what `kernels/` does. A kernel reads each operand once and writes
its result once; between kernels nothing stays in a cache. So `floor_s`, kernels one after another,
each at the speed of memory or of arithmetic, is what a step cannot beat by much at that level.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_dist.models.build import build_model
from resnet_dist.models.layers import PadShortcut
from resnet_dist.models.norm import GhostBatchNorm2d

Level = Literal["eager", "fused"]


@dataclass(frozen=True)
class Kernel:
    group: str  # conv, batch_norm, elementwise, pool, head, input, optimizer
    bytes: float
    flops: float = 0.0


def step_kernels(name: str, *, batch: int, size: int, num_classes: int, level: Level,
                 element: int = 2) -> list[Kernel]:
    """Every kernel of a training step. element: bytes of an activation."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes).train()
        x = torch.empty((batch, 3, size, size))
    counted = _Counted(level, element)
    consumers: Counter[int] = Counter()
    alive: list[Tensor] = []  # so that no id is given twice

    def consume(x: Tensor) -> None:
        alive.append(x)
        consumers[id(x)] += 1
        if consumers[id(x)] > 1:
            counted.gradient_sum(x)

    def record(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any],
               y: Tensor) -> None:
        alive.append(y)
        if isinstance(module, nn.Conv2d):
            consume(args[0])
            counted.conv(module, args[0], y)
        elif isinstance(module, GhostBatchNorm2d):
            residual = keywords.get("residual", args[1] if len(args) > 1 else None)
            if residual is not None:
                consume(residual)
            relu = keywords.get("relu", args[2] if len(args) > 2 else False)
            counted.batch_norm(y, residual is not None, relu)
        elif isinstance(module, PadShortcut):
            consume(args[0])
        elif isinstance(module, nn.MaxPool2d):
            counted.max_pool(args[0], y)
        elif isinstance(module, nn.Linear):
            counted.linear(module, args[0], y)

    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    counted.rest(x, sum(p.numel() for p in model.parameters()))
    return counted.kernels


def totals(kernels: list[Kernel]) -> tuple[float, float]:
    """Bytes and FLOPs (two a multiply-add) of a step."""
    return sum(k.bytes for k in kernels), sum(k.flops for k in kernels)


def floor_s(kernels: list[Kernel], bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds of the kernels one after another, each as fast as memory and arithmetic let it."""
    return sum(max(k.bytes / bytes_per_s, k.flops / flops_per_s) for k in kernels)


class _Counted:
    """Writes kernels down, forward and backward together."""

    def __init__(self, level: Level, element: int) -> None:
        self.kernels: list[Kernel] = []
        self._fused, self._element = level == "fused", element
        self._first = True

    def _size(self, x: Tensor) -> int:
        return x.numel() * self._element

    def _add(self, group: str, size: float, flops: float = 0.0) -> None:
        self.kernels.append(Kernel(group, size, flops))

    def conv(self, module: nn.Conv2d, x: Tensor, y: Tensor) -> None:
        weights = module.weight.numel() * self._element
        read, written = self._size(x), self._size(y)
        flops = 2.0 * y.numel() * module.weight[0].numel()
        if self._first:  # pixels: four channels, and no gradient
            read = read // module.in_channels * 4
        # A strided 1x1 convolution touches the pixels it samples.
        sampled = read / (module.stride[0] ** 2 if module.kernel_size == (1, 1) else 1)
        self._add("conv", sampled + weights + written, flops)
        self._add("conv", written + sampled + weights, flops)  # of the weights
        if not self._first:
            self._add("conv", written + weights + read, flops)  # of the input
        self._first = False

    def batch_norm(self, y: Tensor, residual: bool, relu: bool) -> None:
        size = self._size(y)
        mask = size / self._element / 8
        if self._fused:
            self._add("batch_norm", size)
            self._add("batch_norm", 2 * size + residual * (size + mask))
            self._add("batch_norm", 2 * size + residual * (size + mask))
            self._add("batch_norm", 3 * size)
            return
        for passes in (1, 2, 2, 3):  # moments, apply; sums, gradient
            self._add("batch_norm", passes * size)
        if residual:
            self._add("elementwise", 3 * size)
        if relu:
            self._add("elementwise", 2 * size)
            self._add("elementwise", 3 * size)

    def gradient_sum(self, x: Tensor) -> None:
        """A tensor with two consumers gets two gradients, which are added."""
        self._add("elementwise", 3 * self._size(x))

    def max_pool(self, x: Tensor, y: Tensor) -> None:
        index = y.numel() * (1 if self._fused else 8)
        for _ in range(2):
            self._add("pool", self._size(x) + self._size(y) + index)

    def linear(self, module: nn.Linear, x: Tensor, y: Tensor) -> None:
        once = self._size(x) + self._size(y) + module.weight.numel() * self._element
        self._add("head", 3 * once, 6.0 * x.shape[0] * module.weight.numel())

    def rest(self, x: Tensor, parameters: int) -> None:
        """Pixels in, weights out: float32 weight, momentum and gradient, and a 16-bit copy."""
        pixels = x.numel()
        self._add("input", pixels + pixels / 3 * 4 * self._element)
        self._add("optimizer", parameters * (4 * 5 + (2 if self._fused else 2 + 4 + 2)))
