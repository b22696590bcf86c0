"""What each kernel means, in plain PyTorch: the oracle the fast versions are tested against.

Every function here works in any floating dtype (float64 in tests), on any device, and is
differentiable by autograd alone. Nothing here is fast.
"""

import torch
import torch.nn.functional as F
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


def max_pool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The largest of every `size` x `size` window; its first place takes the gradient.

    x: [n, c, h, w] -> [n, c, (h + 2 padding - size) // stride + 1, likewise].
    """
    return F.max_pool2d(x, size, stride, padding)


def average_pool(x: Tensor) -> Tensor:
    """The mean over pixels, summed in float32 at least: [n, c, h, w] -> [n, c], x's dtype."""
    return x.mean((2, 3))


def normalize(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype,
              flip: Tensor | None = None, colour: Tensor | None = None) -> Tensor:
    """(mirrored? images + colour?) * scale + shift, in float32, with a channel of zeros behind.

    Args:
        images: uint8 [n, h, w, 3].
        scale, shift: float32, broadcastable to [n, 3, h, w].
        flip: bool [n], the images to mirror from left to right.
        colour: float32 [n, 3], added to every pixel, in grey levels.

    Returns: `dtype` [n, 4, h, w] in channels_last memory.
    """
    x = images.permute(0, 3, 1, 2).to(scale.dtype)
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    if colour is not None:
        x = x + colour[:, :, None, None]
    x = F.pad(x * scale + shift, (0, 0, 0, 0, 0, 1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
