"""What is subtracted from an image and what it is divided by; what lies outside a picture.

In: a data set's manifest and the configuration. Out: arrays for the device and for the decoder.
"""

from __future__ import annotations

import numpy as np

from resnet_dist.data.shards.manifest import Manifest
from resnet_dist.data.shards.reader import DataError
from resnet_dist.run.paths import DatasetPaths


def normalization(manifest: Manifest, paths: DatasetPaths, normalize: str,
                  size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, 1 / std) float32, broadcastable to [n, 3, size, size], for images in [0, 1].

    Raises: DataError where `normalize` is "pixel" and the mean image is missing, damaged, or not
    `size` square.
    """
    if normalize == "pixel":
        image = _pixel_mean(manifest, paths, size) / np.float32(255)
        return (np.ascontiguousarray(image.transpose(2, 0, 1)[None]),
                np.ones((1, 3, 1, 1), np.float32))
    mean = np.asarray(manifest.mean, np.float32).reshape(1, 3, 1, 1)
    if normalize == "mean":
        return mean, np.ones_like(mean)
    if min(manifest.std) <= 0:
        raise DataError(f"augment.normalize = channel: {paths.manifest} records standard "
                        f"deviations {manifest.std}; use augment.normalize=mean")
    inverse = 1.0 / np.asarray(manifest.std, np.float64)
    return mean, inverse.astype(np.float32).reshape(1, 3, 1, 1)


def padding(manifest: Manifest, paths: DatasetPaths, normalize: str, size: int) -> np.ndarray:
    """What pixels outside a picture show: uint8 [size, size, 3], 0 (+-1/510) once normalised.

    The paper pads with zeros what already had its mean subtracted; subtraction here comes after the
    crop, so the padding is the mean (with normalize "pixel", the mean image where it will be
    subtracted), rounded to a grey level.
    """
    mean, _ = normalization(manifest, paths, normalize, size)
    image = np.broadcast_to(mean * 255, (1, 3, size, size))[0].transpose(1, 2, 0)
    return np.ascontiguousarray(np.rint(image).astype(np.uint8))


def _pixel_mean(manifest: Manifest, paths: DatasetPaths, size: int) -> np.ndarray:
    try:
        image = np.load(paths.pixel_mean, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"augment.normalize = pixel: {paths.pixel_mean} cannot be read ({error}); "
                        "use augment.normalize=mean or convert again") from None
    if image.shape != (size, size, 3):
        raise DataError(f"augment.normalize = pixel: the mean image is {image.shape[0]} x "
                        f"{image.shape[1]}, augment.size = {size}; use augment.normalize=mean")
    return image.astype(np.float32)
