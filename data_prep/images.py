"""One image: from the source's bytes to what a shard stores, or the reason why it cannot be.

In: an encoded file, or RGB pixels. Out: a JPEG stream or raw pixels, always RGB or grey, 8 bits, as
a person sees the image: orientation applied, transparency laid over white, 16-bit values scaled,
palettes resolved, CMYK converted, the first frame of several. Same input, same bytes.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.beton import MODE_JPEG, MODE_RAW
from data_prep.sources import Unreadable

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
MAX_SIDE = 65_500  # libjpeg's limit; FFCV keeps 16 bits
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any pixel is decoded


@dataclass(frozen=True)
class Encoding:
    """How images are stored; recorded in the manifest."""

    image: str  # "jpeg", "raw" or "mixed"
    raw_fraction: float  # of mixed images
    longer_side: int | None
    shorter_side: int | None
    quality: int
    keep: bool
    max_pixels: int


@dataclass(frozen=True)
class Encoded:
    mode: int
    width: int
    height: int
    data: bytes
    pixels: np.ndarray  # uint8 [height, width, 3], what a loader will see


def encode(raw: bytes | np.ndarray, encoding: Encoding, name: str) -> Encoded:
    """Raises: Unreadable with the reason."""
    jpeg = isinstance(raw, bytes) and raw[:2] == b"\xff\xd8"
    pixels = raw if isinstance(raw, np.ndarray) else decode(raw, encoding.max_pixels)
    target = fitted(pixels.shape[1], pixels.shape[0], encoding)
    if target != (pixels.shape[1], pixels.shape[0]):
        pixels = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BOX))
        jpeg = False
    height, width = pixels.shape[:2]
    as_raw = encoding.image == "raw" or (
        encoding.image == "mixed" and zlib.crc32(name.encode("utf-8", "surrogateescape"))
        < encoding.raw_fraction * 2**32)
    if as_raw:
        return Encoded(MODE_RAW, width, height, np.ascontiguousarray(pixels).tobytes(), pixels)
    if jpeg and encoding.keep and isinstance(raw, bytes) and _is_plain_baseline(raw):
        return Encoded(MODE_JPEG, width, height, raw, pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.quality, subsampling="4:2:0",
                                 restart_marker_rows=1)
    data = buffer.getvalue()
    return Encoded(MODE_JPEG, width, height, data, np.asarray(Image.open(io.BytesIO(data))))


def fitted(width: int, height: int, encoding: Encoding) -> tuple[int, int]:
    """(width, height) within the size limit; images are never enlarged."""
    if encoding.longer_side and max(width, height) > encoding.longer_side:
        limit, side = encoding.longer_side, max(width, height)
    elif encoding.shorter_side and min(width, height) > encoding.shorter_side:
        limit, side = encoding.shorter_side, min(width, height)
    else:
        return width, height
    return max(1, round(width * limit / side)), max(1, round(height * limit / side))


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """uint8 RGB [height, width, 3] of any supported file. Raises: Unreadable."""
    if not data:
        raise Unreadable("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels or max(width, height) > MAX_SIDE:
                    raise Unreadable(f"has {width} x {height} pixels, more than max_pixels = "
                                     f"{max_pixels} or a side above {MAX_SIDE}")
                image.load()
                return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise Unreadable("is not an image of a known format") from None
    except Unreadable:
        raise
    except MemoryError:
        raise
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError,
            TypeError, AttributeError, OverflowError, zlib.error, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"cannot be decoded ({reason[:200]})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as a person would see it. Pillow's own `convert` clips 16-bit values to white and
    uncovers what transparency hides; both are handled here."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise Unreadable("has 32-bit pixels of an unknown range")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unreadable("has floating-point pixels of an unknown range")
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        paper = Image.new("RGBA", visible.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, visible).convert("RGB")
    return image.convert("RGB")


def _is_plain_baseline(data: bytes) -> bool:
    """8-bit Huffman-coded baseline, grey or YCbCr, no rotation: what every decoder reads alike."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return False
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], "big")
        if marker == 0xE1 and data[at + 4:at + 8] == b"Exif":
            return False
        if marker == 0xC0:
            return data[at + 4] == 8 and data[at + 9] in (1, 3)
        if marker == 0xDA or (0xC1 <= marker <= 0xCF and marker not in (0xC4, 0xCC)):
            return False
        at += 2 + length
    return False
