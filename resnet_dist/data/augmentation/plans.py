"""From draws to plans: which box of each image becomes which pixels. Pure NumPy, a batch at a time.

In: the augmentation's configuration, (seed, epoch, sample id) and the images' sizes.
Out: one `PLAN` record an image, which the native decoder carries out.
"""

from __future__ import annotations

import numpy as np

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation import policy
from resnet_dist.data.augmentation.random import Purpose, normals, uniforms
from resnet_dist.data.decode.decoder import PLAN, Op

# Principal components of RGB (in [0, 1]) over ImageNet's training images: standard deviations along
# them, and the unit vectors as columns. Source: Krizhevsky et al. 2012, section 4.1; figures as in
# fb.resnet.torch, datasets/imagenet.lua.
PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009],
                        [-0.5808, -0.0045, -0.8140],
                        [-0.5836, -0.6948, 0.4203]])


def train_plans(augment: AugmentConfig, seed: int, epochs: np.ndarray, ids: np.ndarray,
                heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """PLAN [m] for training images of the given heights and widths, to be made `size` square."""
    crop = {"scale_crop": scale_crop, "random_resized_crop": random_resized_crop,
            "pad_crop": pad_crop, "resize": resize}[augment.name]
    plans = crop(augment, seed, epochs, ids, heights.astype(np.int64),
                 widths.astype(np.int64), size)
    if augment.flip:
        plans["flip"] = uniforms(seed, epochs, ids, Purpose.FLIP, 1)[:, 0] < 0.5
    if augment.rand_ops:
        policy.rand_augment(plans, augment, seed, epochs, ids)
    if augment.trivial:
        policy.trivial_augment(plans, seed, epochs, ids, size)
    if augment.brightness or augment.contrast or augment.saturation:
        policy.color_jitter(plans, augment, seed, epochs, ids)
    if augment.pca:
        shift = pca_shift(augment.pca, seed, epochs, ids)
        alone = plans["num_ops"] == 0
        plans["shift"][alone] = shift[alone]  # added before rounding, at no cost
        policy.append(plans, ~alone, Op.SHIFT, *shift.T)
    if augment.erase:
        policy.random_erasing(plans, augment, seed, epochs, ids, size)
    return plans


def size_at(augment: AugmentConfig, epoch: int) -> int:
    """Side of the crop in batches that begin in `epoch` (progressive resizing)."""
    size = augment.size
    for first, later in augment.sizes:
        if epoch >= first:
            size = later
    return size


def scale_crop(augment: AugmentConfig, seed: int, epochs: np.ndarray, ids: np.ndarray,
               heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """Shorter side drawn from [min_side, max_side], then a `size` square crop anywhere.

    Source: He et al. 2015, section 3.4 (from Simonyan and Zisserman 2014). With another `size` than
    the configured one (progressive resizing) the sides are scaled alike.
    """
    u = uniforms(seed, epochs, ids, Purpose.CROP, 3)
    ratio = size / augment.size
    low, high = round(augment.min_side * ratio), round(augment.max_side * ratio)
    side = low + np.floor(u[:, 0] * (high - low + 1))
    shorter = np.minimum(heights, widths)
    tall, wide = np.rint(heights * side / shorter), np.rint(widths * side / shorter)
    top = np.floor(u[:, 1] * (tall - size + 1))
    left = np.floor(u[:, 2] * (wide - size + 1))
    return _crop_of_resized(heights, widths, tall, wide, top, left, size)


def random_resized_crop(augment: AugmentConfig, seed: int, epochs: np.ndarray, ids: np.ndarray,
                        heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """A box with a drawn share of the area and a drawn aspect ratio; ten tries, then the centre.

    Source: Szegedy et al. 2014, section 6, with torchvision's rule for boxes that do not fit.
    """
    tries = 10
    u = uniforms(seed, epochs, ids, Purpose.CROP, 4 * tries).reshape(len(ids), tries, 4)
    low, high = augment.scale
    area = (heights * widths)[:, None] * (low + u[..., 0] * (high - low))
    log_low, log_high = np.log(augment.ratio[0]), np.log(augment.ratio[1])
    aspect = np.exp(log_low + u[..., 1] * (log_high - log_low))
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide >= 1) & (tall >= 1) & (wide <= widths[:, None]) & (tall <= heights[:, None])
    first = (np.arange(len(ids)), np.argmax(fits, axis=1))
    found = fits[first]
    tall, wide = tall[first], wide[first]
    top = np.floor(u[first][:, 2] * (heights - tall + 1))
    left = np.floor(u[first][:, 3] * (widths - wide + 1))
    shape = widths / heights
    fallback_wide = np.where(shape > augment.ratio[1], np.rint(heights * augment.ratio[1]), widths)
    fallback_tall = np.where(shape < augment.ratio[0], np.rint(widths / augment.ratio[0]), heights)
    tall = np.where(found, tall, np.maximum(fallback_tall, 1))
    wide = np.where(found, wide, np.maximum(fallback_wide, 1))
    top = np.where(found, top, (heights - tall) // 2)
    left = np.where(found, left, (widths - wide) // 2)
    return _plans(top, left, tall, wide, size)


def pad_crop(augment: AugmentConfig, seed: int, epochs: np.ndarray, ids: np.ndarray,
             heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """`pad` pixels on every side, then a `size` square crop anywhere, pixels copied as they are.

    Source: He et al. 2015, section 4.2. The padding shows the mean, which is 0 once the mean is
    subtracted; see `normalize.padding`.
    """
    u = uniforms(seed, epochs, ids, Purpose.CROP, 2)
    rows, cols = heights + 2 * augment.pad - size, widths + 2 * augment.pad - size
    if (rows < 0).any() or (cols < 0).any():
        worst = int(np.argmin(np.minimum(rows, cols)))
        raise ValueError(f"augment.size = {size}: sample {ids[worst]} is {heights[worst]} x "
                         f"{widths[worst]} and augment.pad = {augment.pad}; use a smaller size, "
                         "more padding, or augment.name=random_resized_crop")
    top = np.floor(u[:, 0] * (rows + 1)) - augment.pad
    left = np.floor(u[:, 1] * (cols + 1)) - augment.pad
    square = np.full(len(ids), float(size))
    return _plans(top, left, square, square, size)


def resize(augment: AugmentConfig, seed: int, epochs: np.ndarray, ids: np.ndarray,
           heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """No draw: shorter side to `size`, centre crop."""
    return center_crop(heights, widths, size, size)


def center_crop(heights: np.ndarray, widths: np.ndarray, side: int | None,
                size: int) -> np.ndarray:
    """PLAN [m]: shorter side to `side`, then the `size` square in the middle.

    `side` None takes the square from the picture as it is. Rounding as torchvision's
    Resize and CenterCrop do it. Raises: ValueError where a picture is too small for that.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    shorter = np.minimum(heights, widths)
    if side is None:
        if (shorter < size).any():
            raise ValueError(f"eval.size = {size}: exceeds an image of {shorter.min()} pixels; "
                             "set eval.resize or a smaller eval.size")
        tall, wide = heights, widths
    else:
        tall, wide = side * heights // shorter, side * widths // shorter
    top, left = np.rint((tall - size) / 2.0), np.rint((wide - size) / 2.0)
    return _crop_of_resized(heights, widths, tall, wide, top, left, size)


def pca_shift(sigma: float, seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What PCA colour noise adds to R, G, B of each image, in grey levels: float32 [m, 3].

    One draw an image. Source: Krizhevsky et al. 2012, section 4.1.
    """
    alpha = sigma * normals(seed, epochs, ids, Purpose.PCA, 3)
    shift = 255.0 * (alpha * PCA_VALUES) @ PCA_VECTORS.T
    return np.clip(shift, -255.0, 255.0).astype(np.float32)


def _crop_of_resized(heights: np.ndarray, widths: np.ndarray, tall: np.ndarray, wide: np.ndarray,
                     top: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """The box of the original that a square crop of the resized picture shows."""
    step_y, step_x = heights / tall, widths / wide
    return _plans(top * step_y, left * step_x, size * step_y, size * step_x, size)


def _plans(top: np.ndarray, left: np.ndarray, tall: np.ndarray, wide: np.ndarray,
           size: int) -> np.ndarray:
    plans = np.zeros(len(top), PLAN)
    plans["top"], plans["left"], plans["height"], plans["width"] = top, left, tall, wide
    # A box of whole pixels that has the output's size is copied, never resampled.
    plans["copy"] = ((plans["height"] == size) & (plans["width"] == size)
                     & (plans["top"] % 1 == 0) & (plans["left"] % 1 == 0))
    return plans
