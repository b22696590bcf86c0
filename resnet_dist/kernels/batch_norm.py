"""Ghost BatchNorm on the library's own kernels: one call per group, no concatenation.

Each group's result is written into its slice of one output. A slice of consecutive images is
contiguous in channels_last as in NCHW, so no call copies its input. The forward pass writes in
place through the out-variant; the backward pass has none that does (it would allocate and copy), so
one group's gradient, still in cache, is copied into its slice.
"""

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _dense(t: Tensor) -> Tensor:
    """t itself if its memory is NHWC or NCHW without holes, else an NHWC copy."""
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _as_laid_out(t: Tensor, like: Tensor) -> Tensor:
    if t.stride() == like.stride():
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


class _GhostBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        bn_batch: int,
        eps: float,
        residual: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x)
        num_groups, channels = x.shape[0] // bn_batch, x.shape[1]
        # With momentum 1 the library's "running" statistics become this group's mean and unbiased
        # variance. They must be finite before: 0 * NaN would stay.
        mean, var = weight.new_zeros((2, num_groups, channels)).unbind(0)
        if num_groups == 1:
            y, saved_mean, saved_invstd = torch.native_batch_norm(
                x, weight, bias, mean[0], var[0], True, 1.0, eps
            )
            saved_mean, saved_invstd = saved_mean.unsqueeze(0), saved_invstd.unsqueeze(0)
        else:
            y = torch.empty_like(x)
            saved_mean, saved_invstd = torch.empty_like(mean), torch.empty_like(var)
            groups = zip(x.split(bn_batch), y.split(bn_batch), mean.unbind(), var.unbind(),
                         saved_mean.unbind(), saved_invstd.unbind(), strict=True)
            for x_g, y_g, mean_g, var_g, *saved_g in groups:
                torch.native_batch_norm(x_g, weight, bias, mean_g, var_g, True, 1.0, eps,
                                        out=(y_g, *saved_g))
        if residual is not None:
            y.add_(residual)
        if relu:
            y.relu_()
        ctx.save_for_backward(x, weight, y if relu else None, saved_mean, saved_invstd)
        ctx.bn_batch, ctx.eps = bn_batch, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, saved_mean, saved_invstd = ctx.saved_tensors
        grad = _as_laid_out(grad_y, like=x)
        grad_residual = None
        if y is not None and ctx.residual_dtype is not None:
            grad = _aten.threshold_backward(grad, y, 0)  # whole: the residual needs it
            y = None
        if ctx.residual_dtype is not None:
            grad_residual = grad.to(ctx.residual_dtype)

        def group_gradients(
            grad_g: Tensor, x_g: Tensor, y_g: Tensor | None, mean_g: Tensor, invstd_g: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            if y_g is not None:
                grad_g = _aten.threshold_backward(grad_g, y_g, 0)
            return _aten.native_batch_norm_backward(
                grad_g, x_g, weight, None, None, mean_g, invstd_g, True, ctx.eps,
                [True, True, True],
            )

        num_groups = saved_mean.shape[0]
        if num_groups == 1:
            grad_x, grad_weight, grad_bias = group_gradients(
                grad, x, y, saved_mean[0], saved_invstd[0]
            )
        else:
            grad_x = torch.empty_like(x)
            rectified = [None] * num_groups if y is None else y.split(ctx.bn_batch)
            groups = zip(grad.split(ctx.bn_batch), x.split(ctx.bn_batch), rectified,
                         saved_mean.unbind(), saved_invstd.unbind(), strict=True)
            weights, biases = [], []
            for out_g, group in zip(grad_x.split(ctx.bn_batch), groups, strict=True):
                dx, weight_g, bias_g = group_gradients(*group)
                out_g.copy_(dx)
                weights.append(weight_g)
                biases.append(bias_g)
            grad_weight, grad_bias = torch.stack(weights).sum(0), torch.stack(biases).sum(0)
        return grad_x, grad_weight, grad_bias, None, None, grad_residual, None


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bn_batch: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.ghost_batch_norm` with the library's kernels; forward and first derivative."""
    return _GhostBatchNorm.apply(x, weight, bias, bn_batch, eps, residual, relu)
