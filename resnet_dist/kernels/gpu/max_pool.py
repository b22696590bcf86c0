"""Max-pooling of channels_last images in Triton; remembers winners in one byte an output.

The library keeps an int64 index an output: four times the bytes of a bf16 output. Here the index
is the winner's place in its window. The backward pass gathers: an input looks at the few windows
that cover it, so nothing is added by atomics and the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_dist.kernels.gpu.limits import OPTIONS, at_most

TILE = 2048  # elements: a tile stays in registers beside the running maximum and its place


@at_most(registers=96)
@triton.jit
def _forward_kernel(x, y, place, outputs, channels, height, width, out_height, out_width,
                    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
                    ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (row < outputs)[:, None] & (c < channels)[None, :]
    top = (row // out_width) % out_height * STRIDE - PADDING
    left = row % out_width * STRIDE - PADDING
    image = (row // (out_width * out_height)).to(tl.int64) * height * width
    best = tl.full([ROWS, CHANNELS], float("-inf"), tl.float32)
    winner = tl.full([ROWS, CHANNELS], 255, tl.int32)
    for tap in tl.static_range(SIZE * SIZE):
        h, w = top + tap // SIZE, left + tap % SIZE
        inside = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None] & real
        at = (image + h * width + w)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        # The first of equals wins, and what is no number, as in the library.
        wins = inside & ((value > best) | (value != value) | (winner == 255))
        best = tl.where(wins, value, best)
        winner = tl.where(wins, tap, winner)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(y + at, best.to(y.dtype.element_ty), mask=real)
    tl.store(place + at, winner.to(tl.uint8), mask=real)


@at_most(registers=96)
@triton.jit
def _backward_kernel(grad, place, grad_x, inputs, channels, height, width, out_height, out_width,
                     SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
                     REACH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (row < inputs)[:, None] & (c < channels)[None, :]
    h = (row // width) % height + PADDING
    w = row % width + PADDING
    image = (row // (width * height)).to(tl.int64) * out_height * out_width
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    # The last window that starts at or above h, and those before it that still reach h.
    for up in tl.static_range(REACH):
        for back in tl.static_range(REACH):
            oh, ow = h // STRIDE - up, w // STRIDE - back
            dh, dw = h - oh * STRIDE, w - ow * STRIDE
            covers = ((oh >= 0) & (oh < out_height) & (dh < SIZE)
                      & (ow >= 0) & (ow < out_width) & (dw < SIZE))[:, None] & real
            at = (image + oh * out_width + ow)[:, None] * channels + c[None, :]
            winner = tl.load(place + at, mask=covers, other=255).to(tl.int32)
            g = tl.load(grad + at, mask=covers, other=0.0).to(tl.float32)
            total += tl.where(winner == (dh * SIZE + dw)[:, None], g, 0.0)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=real)


def _blocks(channels: int) -> tuple[int, int]:
    columns = min(64, triton.next_power_of_2(channels))
    # Where no vector fits, every element has an address of its own: fewer at once.
    return TILE // columns // (1 if channels % 8 == 0 else 4), columns


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int, padding: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        out_height, out_width = ((extent + 2 * padding - size) // stride + 1
                                 for extent in (height, width))
        shape = (images, channels, out_height, out_width)
        y = torch.empty(shape, dtype=x.dtype, device=x.device,
                        memory_format=torch.channels_last)
        place = torch.empty_like(y, dtype=torch.uint8)
        ROWS, CHANNELS = _blocks(channels)
        outputs = images * out_height * out_width
        grid = (triton.cdiv(outputs, ROWS), triton.cdiv(channels, CHANNELS))
        _forward_kernel[grid](x, y, place, outputs, channels, height, width, out_height, out_width,
                              SIZE=size, STRIDE=stride, PADDING=padding, ROWS=ROWS,
                              CHANNELS=CHANNELS, **OPTIONS)
        ctx.save_for_backward(place)
        ctx.shape, ctx.window = x.shape, (size, stride, padding)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        images, channels, height, width = ctx.shape
        size, stride, padding = ctx.window
        grad = grad_y.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device,
                             memory_format=torch.channels_last)
        ROWS, CHANNELS = _blocks(channels)
        inputs = images * height * width
        grid = (triton.cdiv(inputs, ROWS), triton.cdiv(channels, CHANNELS))
        _backward_kernel[grid](grad, place, grad_x, inputs, channels, height, width,
                               *grad.shape[2:], SIZE=size, STRIDE=stride, PADDING=padding,
                               REACH=triton.cdiv(size, stride), ROWS=ROWS, CHANNELS=CHANNELS,
                               **OPTIONS)
        return grad_x, None, None, None


def max_pool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """`reference.max_pool` for float32 and 16-bit x; y is channels_last."""
    return _MaxPool.apply(x, size, stride, padding)
