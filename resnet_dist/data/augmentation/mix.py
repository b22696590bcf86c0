"""Mixup and cutmix: two images become one, on the device, the same whatever the world.

In: normalised images and labels of a rank's share of global batch `step`. Out: the same, mixed.

Partners stand in one group of `bn_batch` images, which never spans two ranks, in reverse order; the
share of each and the cut box are drawn once a group, from (seed, step, group). So the world size
changes neither who is mixed with whom nor how much, and a BatchNorm group holds mixtures of its own
images only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation.random import Purpose, uniforms


@dataclass(frozen=True)
class Targets:
    """What the images of a batch show.

    labels: int64 [n]. Where images are mixed, image i shows `weights[i]` of labels[i] and
    1 - weights[i] of partners[i]: int64 [n], float32 [n].
    """

    labels: Tensor
    partners: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Targets:
        return Targets(self.labels[part],
                       None if self.partners is None else self.partners[part],
                       None if self.weights is None else self.weights[part])


Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Targets]]


@dataclass(frozen=True)
class Mix:
    """What happens to one group: an image keeps `share`; cutmix pastes a box [y0:y1, x0:x1]."""

    share: float
    box: tuple[int, int, int, int] | None  # None: mixup


def mixer(augment: AugmentConfig, seed: int, step: int, start: int, group: int) -> Mixer | None:
    """Mixes images [n, 3, S, S] and labels [n] that stand at positions [start, start + n) of the
    global batch; None where the configuration mixes nothing.

    `start` and n are multiples of `group`, which is `bn_batch`.
    """
    if not (augment.mixup or augment.cutmix):
        return None

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        count, _, height, width = images.shape
        if start % group or count % group:
            raise ValueError(f"bn_batch = {group}: mixup needs whole groups on a rank, got images "
                             f"[{start}, {start + count}); choose a world that divides the groups")
        drawn = draw(augment, seed, step, start // group, count // group, height, width)
        mixed = [_mix_group(images[i * group:(i + 1) * group], one)
                 for i, one in enumerate(drawn)]
        layout = torch.channels_last if images.is_contiguous(
            memory_format=torch.channels_last) else torch.contiguous_format
        shares = torch.tensor([one.share for one in drawn], dtype=torch.float32)
        weights = shares.repeat_interleave(group).to(images.device, non_blocking=True)
        partners = labels.view(-1, group).flip(1).reshape(-1)
        return (torch.cat(mixed).contiguous(memory_format=layout),
                Targets(labels, partners, weights))

    return mix


def draw(augment: AugmentConfig, seed: int, step: int, first_group: int, groups: int, height: int,
         width: int) -> list[Mix]:
    """What happens to groups [first_group, first_group + groups) of global batch `step`.

    Source: Zhang et al. 2017 (mixup), section 2; Yun et al. 2019 (cutmix), section 3.1; where both
    are on, each group takes one or the other with equal odds, as timm does a batch.
    """
    numbers = np.arange(first_group, first_group + groups)
    # One stream of draws a (step, group): the step stands where other draws have their epoch.
    u = uniforms(seed, np.full(groups, step), numbers, Purpose.MIX, 4)
    mixes = []
    for number, (coin, _, y, x) in zip(numbers, u, strict=True):
        cut = bool(augment.cutmix) and (not augment.mixup or coin < 0.5)
        alpha = augment.cutmix if cut else augment.mixup
        share = float(beta(alpha, seed, step, int(number)))
        if not cut:
            mixes.append(Mix(share, None))
            continue
        # Box of area 1 - share around a uniform centre, cut off at the edge; then its real area.
        side = np.sqrt(1.0 - share)
        tall, wide = int(height * side), int(width * side)
        centre_y, centre_x = int(y * height), int(x * width)
        y0, y1 = max(0, centre_y - tall // 2), min(height, centre_y + tall // 2)
        x0, x1 = max(0, centre_x - wide // 2), min(width, centre_x + wide // 2)
        mixes.append(Mix(1.0 - (y1 - y0) * (x1 - x0) / (height * width), (y0, y1, x0, x1)))
    return mixes


def beta(alpha: float, seed: int, step: int, group: int) -> float:
    """A draw from Beta(alpha, alpha), a function of (seed, step, group) alone.

    Source: Jöhnk 1964 for alpha <= 1; rejection from the uniform for alpha > 1. All 128 tries fail
    with odds of 2**-128 at alpha 1, 1e-15 at 20; then the share is a half.
    """
    tries = uniforms(seed, np.full(1, step), np.full(1, group), Purpose.MIX, 2 * 128 + 4)[0, 4:]
    first, second = tries[0::2], np.maximum(tries[1::2], 2.0**-33)
    if alpha <= 1:
        a, b = np.maximum(first, 2.0**-33) ** (1 / alpha), second ** (1 / alpha)
        accepted = np.flatnonzero((a + b <= 1) & (a + b > 0))
        return float(a[accepted[0]] / (a[accepted[0]] + b[accepted[0]])) if len(accepted) else 0.5
    density = (4 * first * (1 - first)) ** (alpha - 1)
    accepted = np.flatnonzero(second <= density)
    return float(first[accepted[0]]) if len(accepted) else 0.5


def _mix_group(images: Tensor, one: Mix) -> Tensor:
    partners = images.flip(0)
    if one.box is None:
        return images * one.share + partners * (1.0 - one.share)
    y0, y1, x0, x1 = one.box
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = partners[:, :, y0:y1, x0:x1]
    return mixed
