"""Colour jitter, RandAugment, TrivialAugment and random erasing: which operations follow the crop,
drawn a batch at a time. Pure NumPy.

In: PLAN records, the configuration, (seed, epoch, sample id). Out: the same records with operations
appended; the native decoder carries them out with Pillow's arithmetic.
"""

from __future__ import annotations

import numpy as np

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation.random import Purpose, normals, uniforms
from resnet_dist.data.decode.decoder import Op

# timm's set of operations whose strength grows with the magnitude, in its order.
RAND_OPS = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT, Op.ROTATE, Op.POSTERIZE, Op.SOLARIZE,
            Op.SOLARIZE_ADD, Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS, Op.SHEAR_X,
            Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
# TrivialAugment's operations after the first, which changes nothing: torchvision's set and order.
TRIVIAL_OPS = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.BRIGHTNESS,
               Op.COLOR, Op.CONTRAST, Op.SHARPNESS, Op.POSTERIZE, Op.SOLARIZE, Op.AUTO_CONTRAST,
               Op.EQUALIZE)
TRIVIAL_LEVELS = 31
BILINEAR, BICUBIC = 0, 1  # second argument of a geometric operation
PADDING, BLACK = 0, 1  # third: what comes in from outside
RAND_PROBABILITY = 0.5  # of each operation, once it is chosen
ERASE_AREA = (0.02, 1 / 3)  # share of the image
ERASE_RATIO = (0.3, 1 / 0.3)  # height / width
_ERASE_TRIES = 10


def append(plans: np.ndarray, where: np.ndarray, code: np.ndarray | int, *args: object) -> None:
    """Add an operation to the plans where `where` is true; `code` and `args` are [m] or scalars."""
    rows = np.flatnonzero(where)
    slots = plans["num_ops"][rows]
    ops = plans["ops"]
    ops["code"][rows, slots] = np.broadcast_to(code, len(plans))[rows]
    for i, values in enumerate(args):
        ops["args"][rows, slots, i] = np.broadcast_to(np.asarray(values), len(plans))[rows]
    plans["num_ops"][rows] += 1


def color_jitter(plans: np.ndarray, augment: AugmentConfig, seed: int, epochs: np.ndarray,
                 ids: np.ndarray) -> None:
    """Brightness, contrast and saturation by factors from [1 - v, 1 + v], in a random order.

    Source: fb.resnet.torch, datasets/transforms.lua (ColorJitter), after Howard 2013.
    """
    strengths = np.array([augment.brightness, augment.contrast, augment.saturation])
    codes = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR])
    u = uniforms(seed, epochs, ids, Purpose.JITTER, 6)
    factors = 1.0 + strengths * (2.0 * u[:, :3] - 1.0)
    order = np.argsort(u[:, 3:], axis=1, kind="stable")
    every = np.arange(len(ids))
    for place in range(3):
        chosen = order[:, place]
        append(plans, strengths[chosen] > 0, codes[chosen], factors[every, chosen])


def rand_augment(plans: np.ndarray, augment: AugmentConfig, seed: int, epochs: np.ndarray,
                 ids: np.ndarray) -> None:
    """`rand_ops` operations an image, each with odds 1/2, magnitude Normal(M, S) cut to [0, 10].

    Source: Cubuk et al. 2019; choices, odds and strengths as in timm's auto_augment.py for
    "rand-m{M}-mstd{S}-inc1" (Wightman et al. 2021, section 2.2): geometric operations interpolate
    bilinearly or bicubically with equal odds, and the mean comes in from outside.
    """
    layers = augment.rand_ops
    u = uniforms(seed, epochs, ids, Purpose.RANDAUGMENT, 3 * layers)
    z = normals(seed, epochs, ids, Purpose.RANDAUGMENT_STRENGTH, layers)
    bicubic = uniforms(seed, epochs, ids, Purpose.RANDAUGMENT_FILTER, layers) < 0.5
    codes = np.array(RAND_OPS)
    for layer in range(layers):
        choice, odds, sign = (u[:, 3 * layer + i] for i in range(3))
        level = np.clip(augment.rand_magnitude + augment.rand_std * z[:, layer], 0.0, 10.0) / 10.0
        code = codes[np.floor(choice * len(codes)).astype(np.int64)]
        append(plans, odds < RAND_PROBABILITY, code, strength(code, level, sign < 0.5),
               np.where(bicubic[:, layer], BICUBIC, BILINEAR), PADDING)


def strength(code: np.ndarray, level: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """timm's argument of operation `code` at `level` in [0, 1]: float64 [m]."""
    sign = np.where(negative, -1.0, 1.0)
    factor = np.maximum(0.1, 1.0 + sign * 0.9 * level)
    values = {
        Op.ROTATE: sign * 30.0 * level, Op.POSTERIZE: 4 - np.floor(level * 4),
        Op.SOLARIZE: 256 - np.floor(level * 256), Op.SOLARIZE_ADD: np.floor(level * 110),
        Op.COLOR: factor, Op.CONTRAST: factor, Op.BRIGHTNESS: factor, Op.SHARPNESS: factor,
        Op.SHEAR_X: sign * 0.3 * level, Op.SHEAR_Y: sign * 0.3 * level,
        Op.TRANSLATE_X: sign * 0.45 * level, Op.TRANSLATE_Y: sign * 0.45 * level,
    }
    return _of_code(code, values)


def trivial_augment(plans: np.ndarray, seed: int, epochs: np.ndarray, ids: np.ndarray,
                    size: int) -> None:
    """One operation an image, with one of 31 strengths, all equally likely.

    Source: Müller and Hutter 2021, section 3 (the wide space of table 2); strengths, rounding,
    bilinear interpolation and black from outside as in torchvision's TrivialAugmentWide, which its
    second recipe uses.
    """
    u = uniforms(seed, epochs, ids, Purpose.TRIVIAL, 3)
    chosen = np.floor(u[:, 0] * (len(TRIVIAL_OPS) + 1)).astype(np.int64) - 1  # -1: as it is
    code = np.array(TRIVIAL_OPS)[chosen]
    level = np.floor(u[:, 1] * TRIVIAL_LEVELS) / (TRIVIAL_LEVELS - 1)
    append(plans, chosen >= 0, code, trivial_strength(code, level, u[:, 2] < 0.5, size), BILINEAR,
           BLACK)


def trivial_strength(code: np.ndarray, level: np.ndarray, negative: np.ndarray,
                     size: int) -> np.ndarray:
    """torchvision's argument of operation `code` at `level` in [0, 1], for a `size` square image:
    float64 [m]."""
    sign = np.where(negative, -1.0, 1.0)
    factor, shear = 1.0 + sign * 0.99 * level, sign * 0.99 * level
    shift = sign * np.floor(32.0 * level + 1e-9) / size  # whole pixels
    values = {
        Op.SHEAR_X: shear, Op.SHEAR_Y: shear, Op.TRANSLATE_X: shift, Op.TRANSLATE_Y: shift,
        Op.ROTATE: sign * 135.0 * level, Op.BRIGHTNESS: factor, Op.COLOR: factor,
        Op.CONTRAST: factor, Op.SHARPNESS: factor, Op.POSTERIZE: 8 - np.rint(level * 6),
        Op.SOLARIZE: 255.0 * (1.0 - level),
    }
    return _of_code(code, values)


def _of_code(code: np.ndarray, values: dict[Op, np.ndarray]) -> np.ndarray:
    """Of each row the value of its operation; 0 where it has none."""
    result = np.zeros(len(code))
    for one, value in values.items():
        result = np.where(code == one, value, result)
    return result


def random_erasing(plans: np.ndarray, augment: AugmentConfig, seed: int, epochs: np.ndarray,
                   ids: np.ndarray, size: int) -> None:
    """With odds `erase`, a box of the crop shows the mean, that is 0 once normalised.

    Source: Zhong et al. 2017, section 3.2, with timm's area and ratio (torchvision writes 0.33 and
    3.3) and with what both put there: 0 after normalization.
    """
    u = uniforms(seed, epochs, ids, Purpose.ERASE, 1 + 4 * _ERASE_TRIES)
    tries = u[:, 1:].reshape(len(ids), _ERASE_TRIES, 4)
    area = size * size * (ERASE_AREA[0] + tries[..., 0] * (ERASE_AREA[1] - ERASE_AREA[0]))
    low, high = np.log(ERASE_RATIO[0]), np.log(ERASE_RATIO[1])
    ratio = np.exp(low + tries[..., 1] * (high - low))
    tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tall >= 1) & (wide >= 1) & (tall < size) & (wide < size)
    first = (np.arange(len(ids)), np.argmax(fits, axis=1))
    tall, wide = tall[first], wide[first]
    top = np.floor(tries[first][:, 2] * (size - tall + 1))
    left = np.floor(tries[first][:, 3] * (size - wide + 1))
    append(plans, (u[:, 0] < augment.erase) & fits[first], Op.ERASE, top, left, tall, wide)
