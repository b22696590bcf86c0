"""Fused NHWC operations. `reference` says what each means; the functions here choose who does it.

This is the one dispatch point: models call `kernels.op(...)` and never a backend. Triton on GPUs
for float32 and 16-bit types; our own compiled loops or the library elsewhere. `torch.compile`
is always shown the plain formulation, which it fuses better than it sees through our own autograd.

Triton is imported when a GPU asks for it: machines without one need not have it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_dist.kernels import batch_norm, native_batch_norm, reference

_imagined: ContextVar[bool] = ContextVar("imagined", default=False)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, tensors of the meta device go where a GPU's would: to see what would be launched."""
    token = _imagined.set(True)
    try:
        yield
    finally:
        _imagined.reset(token)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or (x.is_meta and _imagined.get())


def _by_triton(x: Tensor) -> bool:
    return (_on_gpu(x) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.compiler.is_compiling())


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bn_batch: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.ghost_batch_norm`, fast: y, mean [g, c] and unbiased variance [g, c].

    Raises:
        ValueError: the images are not a multiple of `bn_batch`, or a channel has one value.
    """
    images, values = x.shape[0], bn_batch * x.shape[2] * x.shape[3]
    if bn_batch < 1 or images % bn_batch or images == 0:
        raise ValueError(
            f"bn_batch = {bn_batch} does not divide the {images} images given to BatchNorm; "
            f"make the local batch a multiple of {bn_batch} or change bn_batch"
        )
    if values < 2:
        raise ValueError(
            f"BatchNorm needs more than one value per channel to train, got input {tuple(x.shape)} "
            f"with bn_batch = {bn_batch}; use more images or larger ones"
        )
    if torch.compiler.is_compiling():
        return reference.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)
    if _by_triton(x):
        from resnet_dist.kernels.gpu import batch_norm as on_gpu

        return on_gpu.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)
    if native_batch_norm.suits(x, weight, residual):
        return native_batch_norm.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)
    return batch_norm.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)


def again(y: Tensor) -> Tensor:
    """y for a second reader: a kernel that takes two gradients of y has nobody add them up."""
    return getattr(y, "again", y)


def max_pool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """`reference.max_pool`, fast."""
    if _by_triton(x):
        from resnet_dist.kernels.gpu import max_pool

        return max_pool.max_pool(x, size, stride, padding)
    return F.max_pool2d(x, size, stride, padding)


def average_pool(x: Tensor) -> Tensor:
    """`reference.average_pool`, fast."""
    if _by_triton(x):
        from resnet_dist.kernels.gpu import average_pool

        return average_pool.average_pool(x)
    return x.mean((2, 3))


def normalize(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [n, h, w, 3] -> (x * scale + shift) as `dtype` [n, 3 or 4, h, w], channels_last.

    On a GPU a fourth channel of zeros comes with it (`reference.normalize`).
    """
    if _on_gpu(images):
        from resnet_dist.kernels.gpu import normalize

        return normalize.normalize(images, scale, shift, dtype)
    x = images.permute(0, 3, 1, 2).to(torch.float32)
    return x.mul_(scale).add_(shift).to(dtype)
