"""Fused NHWC operations. `reference` says what each means; the functions here choose who does it.

This is the one dispatch point: models call `kernels.op(...)` and never a backend. An operation that
gets a faster version for some device is given one more line in its function below.
"""

import torch
from torch import Tensor

from resnet_dist.kernels import batch_norm, reference


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
        # The compiler fuses the plain formulation better than it sees through our own autograd.
        return reference.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)
    return batch_norm.ghost_batch_norm(x, weight, bias, bn_batch, eps, residual, relu)


__all__ = ["ghost_batch_norm"]
