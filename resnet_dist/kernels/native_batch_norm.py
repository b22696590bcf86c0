"""Ghost BatchNorm on CPUs by our own compiled loops: all groups in one call, each tensor read once
a pass, addition and ReLU on the way. `native/batch_norm.cpp` says how.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WIDTH = 16  # channels come in multiples of it
_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None, said once, where they were not built."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        file = folder / f"_native{suffix}"
        if file.exists():
            loops = ctypes.CDLL(str(file))
            loops.batch_norm_forward.argtypes = [
                ctypes.c_int, *[_ADDRESS] * 8, *[_COUNT] * 3, ctypes.c_float, ctypes.c_int]
            loops.batch_norm_backward.argtypes = [
                ctypes.c_int, *[_ADDRESS] * 11, *[_COUNT] * 3, ctypes.c_int]
            loops.batch_norm_forward.restype = loops.batch_norm_backward.restype = None
            return loops
    log.warning("%s/_native%s is missing: BatchNorm is computed by torch, which is slower; "
                "`pip install -e .` compiles it", folder, EXTENSION_SUFFIXES[0])
    return None


def suits(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether these loops do this case: bf16 or float32, channels_last, whole vectors."""
    def fits(t: Tensor) -> bool:
        return (t.device.type == "cpu" and t.dtype == x.dtype
                and t.is_contiguous(memory_format=torch.channels_last))

    return (x.dtype in (torch.bfloat16, torch.float32) and x.shape[1] % WIDTH == 0 and fits(x)
            and weight.dtype == torch.float32 and (residual is None or fits(residual))
            and library() is not None)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class _GhostBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, bn_batch: int, eps: float,
                residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        loops = library()
        assert loops is not None, "suits() said so"
        images, channels, height, width = x.shape
        groups, rows = images // bn_batch, bn_batch * height * width
        weight, bias = weight.contiguous(), bias.contiguous()
        y = torch.empty_like(x)
        mean, var, invstd = weight.new_empty((3, groups, channels)).unbind(0)
        loops.batch_norm_forward(
            x.dtype == torch.bfloat16,
            *map(_address, (x, residual, y, weight, bias, mean, var, invstd)),
            groups, rows, channels, eps, relu)
        out = y if relu and residual is not None else None  # else the mask is computed again
        ctx.save_for_backward(x, weight, bias, mean, invstd, out)
        ctx.shape, ctx.relu, ctx.residual = (groups, rows, channels), relu, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        loops = library()
        assert loops is not None
        x, weight, bias, mean, invstd, y = ctx.saved_tensors
        grad = grad_y.to(x.dtype).contiguous(memory_format=torch.channels_last)
        masked = None if y is None else torch.empty_like(x)
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
        loops.batch_norm_backward(
            x.dtype == torch.bfloat16,
            *map(_address, (grad, x, y, masked, grad_x, weight, bias, mean, invstd, grad_weight,
                            grad_bias)),
            *ctx.shape, ctx.relu)
        grad_residual = (grad if masked is None else masked) if ctx.residual else None
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, grad_residual, None


def ghost_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, bn_batch: int, eps: float,
                     residual: Tensor | None = None,
                     relu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.ghost_batch_norm` where `suits` says so; forward and first derivative."""
    return _GhostBatchNorm.apply(x, weight, bias, bn_batch, eps, residual, relu)
