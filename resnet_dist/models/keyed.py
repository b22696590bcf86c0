"""Randomness inside a network as a function of (sample key, layer, element) and nothing else.

The engine gives every forward one int64 key per sample (seed, step and position already mixed in).
A layer's draw hashes that key with the layer's number, so the bits do not depend on how a batch was
split over ranks or micro-batches, on the device, or on what else was drawn.
"""

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the increment of splitmix64, as a signed word
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_RESOLUTION_BITS = 24  # a draw is a multiple of 2**-24, exact in float32


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's on int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(z: Tensor) -> Tensor:
    """One output of splitmix64 for each int64 state (all arithmetic modulo 2**64).

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = z + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


def keep_mask(keys: Tensor, layer: int, elements: int, rate: float) -> Tensor:
    """True with probability 1 - rate: bool [n, elements] from int64 keys [n]."""
    stream = splitmix64(keys ^ splitmix64(torch.full_like(keys, layer)))
    counter = torch.arange(elements, dtype=torch.int64, device=keys.device) * _GOLDEN
    words = splitmix64(stream[:, None] + counter)
    threshold = round((1.0 - rate) * (1 << _RESOLUTION_BITS))
    return _shift_right(words, 64 - _RESOLUTION_BITS) < threshold


class Keyed(nn.Module):
    """A layer that draws: `rate` is the probability of dropping, `layer` its number."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop rate = {rate} is not in [0, 1)")
        self.rate = rate
        self.layer = 0
        self.keys: Tensor | None = None

    def mask(self, n: int, elements: int) -> Tensor:
        if self.keys is None:
            raise RuntimeError(
                f"{type(self).__name__} needs a key per sample to train: call "
                "set_sample_keys(model, keys) before the forward pass"
            )
        if self.keys.shape != (n,):
            raise ValueError(f"{self.keys.numel()} sample keys for a batch of {n} images")
        return keep_mask(self.keys, self.layer, elements, self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class StochasticDepth(Keyed):
    """Zero whole samples of a residual branch, scale the others by 1 / (1 - rate).

    Source: Huang et al. 2016; scaled in training, not in evaluation, as everyone does since.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        mask = self.mask(x.shape[0], 1).to(x.dtype) / (1.0 - self.rate)
        return x * mask.view(-1, *[1] * (x.dim() - 1))


class KeyedDropout(Keyed):
    """Zero single elements, scale the others by 1 / (1 - rate). Source: Srivastava et al. 2014."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        mask = self.mask(x.shape[0], x[0].numel()).view(x.shape)
        return x * (mask.to(x.dtype) / (1.0 - self.rate))


def number_keyed_layers(model: nn.Module) -> None:
    """Give every drawing layer its number, in network order. The builder calls it once."""
    for index, module in enumerate(m for m in model.modules() if isinstance(m, Keyed)):
        module.layer = index


def set_sample_keys(model: nn.Module, keys: Tensor) -> None:
    """Hand the keys of the next forward's samples to every layer that draws.

    Args:
        keys: int64 [n] on the model's device, one per image of the forward that follows. They must
            stay until its backward is done: checkpointing draws again.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"sample keys must be int64 [n], got {keys.dtype} {tuple(keys.shape)}")
    for module in model.modules():
        if isinstance(module, Keyed):
            module.keys = keys
