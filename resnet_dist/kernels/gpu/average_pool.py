"""The average over pixels of channels_last images, in Triton.

The library's backward pass expands the gradient without writing it, so the kernel that takes it
next must copy it to channels_last first; here it is written once, where it belongs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_dist.kernels.gpu.limits import OPTIONS, at_most


@at_most(registers=64)
@triton.jit
def _forward_kernel(x, y, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    image = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    x += image.to(tl.int64) * pixels * channels
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        tile = tl.load(x + p[:, None] * channels + c[None, :], mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    tl.store(y + image * channels + c, (total / pixels).to(y.dtype.element_ty), mask=c < channels)


@at_most(registers=64)
@triton.jit
def _backward_kernel(grad, grad_x, pixels, channels, PIXELS: tl.constexpr,
                     CHANNELS: tl.constexpr):
    image = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.load(grad + image * channels + c, mask=c < channels, other=0.0).to(tl.float32) / pixels
    grad_x += image.to(tl.int64) * pixels * channels
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        tile = tl.broadcast_to(g[None, :], [PIXELS, CHANNELS]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + p[:, None] * channels + c[None, :], tile, mask=inside)


def _launch(kernel: Any, source: Tensor, target: Tensor, shape: torch.Size) -> None:
    images, channels, height, width = shape
    columns = min(128, triton.next_power_of_2(channels))
    pixels = min(2048 // columns, triton.next_power_of_2(height * width))
    kernel[(images, triton.cdiv(channels, columns))](source, target, height * width, channels,
                                                     PIXELS=pixels, CHANNELS=columns, **OPTIONS)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = x.new_empty(x.shape[:2])
        _launch(_forward_kernel, x, y, x.shape)
        ctx.shape = x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        grad_x = torch.empty(ctx.shape, dtype=grad_y.dtype, device=grad_y.device,
                             memory_format=torch.channels_last)
        _launch(_backward_kernel, grad_y.contiguous(), grad_x, ctx.shape)
        return grad_x


def average_pool(x: Tensor) -> Tensor:
    """`reference.average_pool` for float32 and 16-bit x."""
    return _AveragePool.apply(x)
