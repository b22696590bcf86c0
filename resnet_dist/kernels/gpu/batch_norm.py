"""Ghost BatchNorm with addition and ReLU, in Triton, on channels_last activations.

Passes over the activations: forward reads x for the moments, then reads x (and the residual) and
writes y. Backward reads the gradient and x for the sums, then reads them again and writes dx. The
ReLU's mask costs almost nothing: without a residual it is recomputed from x; with one, the forward
pass packs it to one bit an element, and the first backward pass writes the masked gradient, which
is the residual's gradient and must be written anyway. Where two read y, the next block's branch and
its shortcut, that pass takes both gradients: autograd would add them up in a pass of its own.

Sums are taken in float32: every program sums its rows, the second pass of each direction combines
the programs' sums along one fixed tree. No atomics: the same shapes give the same bits.

Rows are pixels: x is [groups, rows, channels], rows = bn_batch * h * w.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_dist.kernels.gpu.limits import OPTIONS, at_most

TILE_BYTES = 8192  # of one tile: four vectors of 128 bits a thread
MAX_SPLITS = 512  # programs that share the rows of one group
TOGETHER = 16  # of them whose sums are combined as one tile
COMPILED_FOR_SMS = 132  # where there is no GPU: an H100's
PROGRAMS_PER_SM = 4  # of 128 threads with 128 registers each: as many as an SM holds at once


@triton.jit
def _normalised(x, mean, scale, bias):
    """Both directions compute y by this one expression, so that its sign is the same in both.

    The fusion is written out: what a compiler fuses by itself it may fuse in one place only.
    """
    scale, bias = tl.broadcast_to(scale[None, :], x.shape), tl.broadcast_to(bias[None, :], x.shape)
    return tl.fma(x - mean[None, :], scale, bias)


@triton.jit
def _rounded(value, pointer):
    """To what `pointer` can hold, in float32: a value that rounds to 0 counts as 0."""
    return value.to(pointer.dtype.element_ty).to(tl.float32)


@at_most(registers=96)
@triton.jit
def _moments_kernel(x, partial, rows, channels, per_program, splits,
                    ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """partial[group, 0 or 1, split, channel]: mean and sum of squared deviations of some rows."""
    split, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = split * per_program
    last = tl.minimum(first + per_program, rows)
    x += group.to(tl.int64) * rows * channels
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = (r < last)[:, None] & (c < channels)[None, :]
        at = r.to(tl.int64)[:, None] * channels + c[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(last - start, ROWS).to(tl.float32)
        before = (start - first).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / count
        off = tl.where(inside, tile - tile_mean[None, :], 0.0)
        # Chan, Golub, LeVeque 1979: means and squared deviations of two sets make those of both.
        delta = tile_mean - mean
        squares += tl.sum(off * off, 0) + delta * delta * (before * count / (before + count))
        mean += delta * (count / (before + count))
    at = (group * 2 * splits + split) * channels + c
    tl.store(partial + at, mean, mask=c < channels)
    tl.store(partial + at + splits * channels, squares, mask=c < channels)


@triton.jit
def _some_programs(at, first, channels, splits, c, SPLITS: tl.constexpr):
    """Their numbers, where their sums lie, and which of these there are."""
    s = first + tl.arange(0, SPLITS)
    parts = (at + s)[:, None] * channels + c[None, :]
    return s, parts, (s < splits)[:, None] & (c < channels)[None, :]


@triton.jit
def _combined_moments(partial, at, rows, channels, per_program, splits, c, SPLITS: tl.constexpr):
    """Mean and sum of squared deviations of all rows, from those of the programs."""
    mean = tl.zeros(c.shape, tl.float32)
    for first in range(0, splits, SPLITS):
        s, parts, there = _some_programs(at, first, channels, splits, c, SPLITS)
        counts = tl.where(s < splits, tl.minimum(rows - s * per_program, per_program), 0)
        means = tl.load(partial + parts, mask=there, other=0.0)
        mean += tl.sum(means * counts.to(tl.float32)[:, None], 0)
    mean = mean / rows
    squared = tl.zeros(c.shape, tl.float32)
    for first in range(0, splits, SPLITS):
        s, parts, there = _some_programs(at, first, channels, splits, c, SPLITS)
        counts = tl.where(s < splits, tl.minimum(rows - s * per_program, per_program), 0)
        off = tl.load(partial + parts, mask=there, other=0.0) - mean[None, :]
        squares = tl.load(partial + parts + splits * channels, mask=there, other=0.0)
        squared += tl.sum(squares + off * off * counts.to(tl.float32)[:, None], 0)
    return mean, squared


@triton.jit
def _combined_sums(partial, at, channels, splits, c, SPLITS: tl.constexpr):
    """The programs' two sums, added up."""
    plain = tl.zeros(c.shape, tl.float32)
    along = tl.zeros(c.shape, tl.float32)
    for first in range(0, splits, SPLITS):
        _, parts, there = _some_programs(at, first, channels, splits, c, SPLITS)
        plain += tl.sum(tl.load(partial + parts, mask=there, other=0.0), 0)
        along += tl.sum(tl.load(partial + parts + splits * channels, mask=there, other=0.0), 0)
    return plain, along


@at_most(registers=128)
@triton.jit
def _apply_kernel(x, y, residual, mask, weight, bias, partial, mean_out, var_out, invstd_out,
                  rows, channels, per_program, splits, mask_bytes, eps,
                  RESIDUAL: tl.constexpr, RELU: tl.constexpr, SPLITS: tl.constexpr,
                  ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Combine the moments; y = relu?((x - mean) * invstd * weight + bias + residual?)."""
    split, group = tl.program_id(0), tl.program_id(2)
    first_channel = tl.program_id(1) * CHANNELS
    c = first_channel + tl.arange(0, CHANNELS)
    real = c < channels
    mean, squared = _combined_moments(partial, group * 2 * splits, rows, channels, per_program,
                                      splits, c, SPLITS)
    invstd = 1.0 / tl.sqrt(squared / rows + eps)
    if split == 0:
        out = group * channels + c
        tl.store(mean_out + out, mean, mask=real)
        tl.store(var_out + out, squared / (rows - 1), mask=real)
        tl.store(invstd_out + out, invstd, mask=real)
    scale = tl.load(weight + c, mask=real, other=0.0) * invstd
    shift = tl.load(bias + c, mask=real, other=0.0)
    base = group.to(tl.int64) * rows
    first = split * per_program
    last = tl.minimum(first + per_program, rows)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        row = base + r.to(tl.int64)
        inside = (r < last)[:, None] & real[None, :]
        at = row[:, None] * channels + c[None, :]
        out = _normalised(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), mean, scale,
                          shift)
        if RESIDUAL:
            out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        out = _rounded(out, y)
        if RELU:
            if RESIDUAL:
                bits = tl.where(out <= 0, 0, 1) << (tl.arange(0, CHANNELS) % 8)[None, :]
                packed = tl.sum(tl.reshape(bits, [ROWS, CHANNELS // 8, 8]), 2).to(tl.uint8)
                byte = first_channel // 8 + tl.arange(0, CHANNELS // 8)
                tl.store(mask + row[:, None] * mask_bytes + byte[None, :], packed,
                         mask=(r < last)[:, None] & (byte < mask_bytes)[None, :])
            out = tl.where(out < 0, 0.0, out)  # what is no number stays so
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@at_most(registers=128)
@triton.jit
def _reduce_kernel(grad, second, x, mask, grad_residual, weight, bias, mean, invstd, partial,
                   rows, channels, per_program, splits, mask_bytes,
                   RESIDUAL: tl.constexpr, RELU: tl.constexpr,
                   ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """partial[group, 0 or 1, split, channel]: sums of g and g * (x - mean), g being masked.

    g is grad, or grad + second, rounded as an addition by autograd would be.
    """
    split, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    m = tl.load(mean + group * channels + c, mask=real, other=0.0)
    scale = (tl.load(weight + c, mask=real, other=0.0)
             * tl.load(invstd + group * channels + c, mask=real, other=0.0))
    shift = tl.load(bias + c, mask=real, other=0.0)
    plain = tl.zeros([CHANNELS], tl.float32)
    along = tl.zeros([CHANNELS], tl.float32)
    base = group.to(tl.int64) * rows
    first = split * per_program
    last = tl.minimum(first + per_program, rows)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        row = base + r.to(tl.int64)
        inside = (r < last)[:, None] & real[None, :]
        at = row[:, None] * channels + c[None, :]
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if second is not None:
            g += tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
            g = _rounded(g, grad)
        if RELU:
            if RESIDUAL:
                byte = tl.load(mask + row[:, None] * mask_bytes + (c // 8)[None, :], mask=inside,
                               other=0)
                g = tl.where((byte.to(tl.int32) >> (c % 8)[None, :]) & 1 == 1, g, 0.0)
                tl.store(grad_residual + at, g.to(grad_residual.dtype.element_ty), mask=inside)
            else:
                out = _rounded(_normalised(wide, m, scale, shift), x)
                g = tl.where(out <= 0, 0.0, g)
        plain += tl.sum(g, 0)
        along += tl.sum(tl.where(inside, g * (wide - m[None, :]), 0.0), 0)
    at = (group * 2 * splits + split) * channels + c
    tl.store(partial + at, plain, mask=real)
    tl.store(partial + at + splits * channels, along, mask=real)


@at_most(registers=128)
@triton.jit
def _gradient_kernel(grad, x, grad_x, weight, bias, mean, invstd, partial, grad_weight, grad_bias,
                     rows, channels, per_program, splits, RECOMPUTE: tl.constexpr,
                     SPLITS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """dx = weight * invstd * (g - mean(g) - x_hat * mean(g * x_hat)), g = grad, masked.

    RECOMPUTE: grad is not masked yet.
    """
    split, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    plain, along = _combined_sums(partial, group * 2 * splits, channels, splits, c, SPLITS)
    m = tl.load(mean + group * channels + c, mask=real, other=0.0)
    inv = tl.load(invstd + group * channels + c, mask=real, other=0.0)
    scale = tl.load(weight + c, mask=real, other=0.0) * inv
    shift = tl.load(bias + c, mask=real, other=0.0)
    if split == 0:
        tl.store(grad_weight + group * channels + c, along * inv, mask=real)
        tl.store(grad_bias + group * channels + c, plain, mask=real)
    constant = plain / rows
    slope = along * inv * inv / rows
    base = group.to(tl.int64) * rows
    first = split * per_program
    last = tl.minimum(first + per_program, rows)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = (r < last)[:, None] & real[None, :]
        at = (base + r.to(tl.int64))[:, None] * channels + c[None, :]
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if RECOMPUTE:
            out = _rounded(_normalised(wide, m, scale, shift), x)
            g = tl.where(out <= 0, 0.0, g)
        dx = (g - constant[None, :] - (wide - m[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=inside)


class _Plan:
    """How the programs share [groups, rows, channels]; a function of the shape and the device.

    All programs of a launch run at once: what does not fit beside them would run alone at the end.
    """

    def __init__(self, shape: torch.Size, itemsize: int, device: torch.device, bn_batch: int
                 ) -> None:
        images, self.channels, height, width = shape
        self.groups, self.rows = images // bn_batch, bn_batch * height * width
        self.CHANNELS = min(64, max(8, triton.next_power_of_2(self.channels)))
        # Where no vector fits, every element has an address of its own: fewer at once.
        tile = TILE_BYTES // itemsize // (1 if self.channels % 8 == 0 else 4)
        self.ROWS = tile // self.CHANNELS
        blocks = triton.cdiv(self.channels, self.CHANNELS)
        sms = (torch.cuda.get_device_properties(device).multi_processor_count
               if device.type == "cuda" else COMPILED_FOR_SMS if device.type == "meta" else 1)
        wanted = max(1, PROGRAMS_PER_SM * sms // (blocks * self.groups))
        tiles = triton.cdiv(self.rows, self.ROWS)
        self.per_program = triton.cdiv(tiles, min(wanted, MAX_SPLITS, tiles)) * self.ROWS
        self.splits = triton.cdiv(self.rows, self.per_program)
        self.SPLITS = min(TOGETHER, triton.next_power_of_2(self.splits))
        self.grid = (self.splits, blocks, self.groups)
        self.mask_bytes = triton.cdiv(self.channels, 8)

    def partial(self, x: Tensor) -> Tensor:
        return x.new_empty((self.groups, 2, self.splits, self.channels), dtype=torch.float32)

    def per_channel(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return x.new_empty((count, self.groups, self.channels), dtype=torch.float32).unbind(0)


_plan = lru_cache(4096)(_Plan)  # every launch of a shape has the same


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class _GhostBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, bn_batch: int, eps: float,
                residual: Tensor | None, relu: bool) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        x = _channels_last(x)
        plan = _plan(x.shape, x.itemsize, x.device, bn_batch)
        y, partial = torch.empty_like(x), plan.partial(x)
        mean, var, invstd = plan.per_channel(x, 3)
        packs = relu and residual is not None
        mask = (x.new_empty((plan.groups * plan.rows, plan.mask_bytes), dtype=torch.uint8)
                if packs else None)
        added = None if residual is None else _channels_last(residual)
        shape = (plan.rows, plan.channels, plan.per_program, plan.splits)
        _moments_kernel[plan.grid](x, partial, *shape, ROWS=plan.ROWS, CHANNELS=plan.CHANNELS,
                                   **OPTIONS)
        _apply_kernel[plan.grid](
            x, y, added, mask, weight, bias, partial, mean, var, invstd, *shape,
            plan.mask_bytes, eps, RESIDUAL=added is not None, RELU=relu,
            SPLITS=plan.SPLITS, ROWS=plan.ROWS, CHANNELS=plan.CHANNELS, **OPTIONS)
        ctx.save_for_backward(x, weight, bias, mean, invstd, mask)
        ctx.bn_batch, ctx.relu = bn_batch, relu
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, *([y.detach()] if packs else [])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, mask = ctx.saved_tensors
        plan = _plan(x.shape, x.itemsize, x.device, ctx.bn_batch)
        given = [_channels_last(g) for g in (grads[0], *grads[3:]) if g is not None]
        if not given:
            return (None,) * 7
        grad, second = given[0], given[1] if given[1:] else None
        grad_x, partial = torch.empty_like(x), plan.partial(x)
        residual = ctx.residual_dtype is not None
        packed = mask is not None
        masked = torch.empty_like(x, dtype=ctx.residual_dtype) if packed else None
        grad_weight, grad_bias = plan.per_channel(x, 2)
        shape = (plan.rows, plan.channels, plan.per_program, plan.splits)
        _reduce_kernel[plan.grid](
            grad, second, x, mask, masked, weight, bias, mean, invstd, partial, *shape,
            plan.mask_bytes, RESIDUAL=packed, RELU=ctx.relu, ROWS=plan.ROWS,
            CHANNELS=plan.CHANNELS, **OPTIONS)
        _gradient_kernel[plan.grid](
            masked if packed else grad, x, grad_x, weight, bias, mean, invstd, partial,
            grad_weight, grad_bias, *shape, RECOMPUTE=ctx.relu and not packed,
            SPLITS=plan.SPLITS, ROWS=plan.ROWS, CHANNELS=plan.CHANNELS, **OPTIONS)
        grad_residual = None
        if residual:
            grad_residual = masked if packed else grad.to(ctx.residual_dtype)
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, grad_residual, None


def ghost_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, bn_batch: int, eps: float,
                     residual: Tensor | None = None,
                     relu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.ghost_batch_norm` for float32 and 16-bit x; y is channels_last.

    Forward and first derivative. weight and bias: float32. With a residual and ReLU, `y.again` is y
    for another reader, whose gradient comes on its own.
    """
    y, mean, var, *again = _GhostBatchNorm.apply(x, weight, bias, bn_batch, eps, residual, relu)
    if again:
        y.again, = again
    return y, mean, var
