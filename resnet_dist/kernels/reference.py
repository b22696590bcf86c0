"""What each kernel means, in plain PyTorch: the oracle the fast versions are tested against.

Every function here works in any floating dtype (float64 in tests), on any device, and is
differentiable by autograd alone. Nothing here is fast.
"""

import torch
from torch import Tensor


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bn_batch: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every `bn_batch` consecutive images by their own statistics, add, rectify.

    `y = relu?((x - mean) / sqrt(biased variance + eps) * weight + bias + residual?)`, statistics
    in float32 where `x` is a 16-bit type, each over (bn_batch, h, w) for one channel.

    Args:
        x: [g * bn_batch, c, h, w].
        weight, bias: [c], float32 where x is a 16-bit type, else x's dtype.
        residual: shape, dtype and memory format of x.

    Returns:
        y with x's shape, dtype and memory format; mean [g, c] and *unbiased* variance [g, c] in the
        dtype of the statistics, detached: they feed the running averages, not the loss.

    Source: Ioffe and Szegedy 2015, algorithm 1; Hoffer et al. 2017, algorithm 1 (ghost batches).
    """
    wide = x.to(weight.dtype)
    grouped = wide.unflatten(0, (x.shape[0] // bn_batch, bn_batch))
    var, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0, keepdim=True)
    normalised = (grouped - mean) * torch.rsqrt(var + eps)
    y = (normalised.flatten(0, 1) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    elements = bn_batch * x.shape[2] * x.shape[3]
    unbiased = var * (elements / (elements - 1))
    channels = x.shape[1]
    return y, mean.detach().view(-1, channels), unbiased.detach().view(-1, channels)
