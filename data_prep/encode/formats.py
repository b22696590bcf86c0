"""Every format but JPEG, through Pillow: 8-bit RGB as a person would see it, or the reason why not.

Strict where Pillow is generous: what it would clip, hide or take for something else is refused.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.encode import reasons
from data_prep.encode.facts import Facts
from data_prep.encode.jpeg import ORIENTATION_TAG
from data_prep.sources.found import Unreadable

FORMATS = ("PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_SIDE = 65_500  # libjpeg's limit; FFCV keeps 16 bits
FULL = 65_535
_BITS, _PHOTOMETRIC, _SAMPLES, _INKS, _EXTRA = 258, 262, 277, 332, 338  # TIFF 6.0, sec. 8, 16, 18
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any pixel is decoded


@cache
def readable() -> tuple[str, ...]:
    """Pillow's names of what is read here; with HEIF where its library is installed."""
    Image.init()
    found = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        import pillow_heif
    except ImportError:
        return found
    pillow_heif.register_heif_opener()
    return (*found, "HEIF")


def reads_heif() -> bool:
    return "HEIF" in readable()


def refuse_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises: Unreadable."""
    if width * height > max_pixels:
        raise Unreadable(f"has {width} x {height} pixels, more than max_pixels = {max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise Unreadable(f"has {width} x {height} pixels; a side may have {MAX_SIDE}")


def decode(data: bytes, max_pixels: int, white: int | None,
           turn: bool) -> tuple[np.ndarray, Facts]:
    """uint8 RGB [height, width, 3] of the first picture. Raises: Unreadable.

    Args:
        white: the 16-bit value that becomes 255; None: 65,535.
        turn: as EXIF says.
    """
    try:
        with Image.open(io.BytesIO(data), formats=readable()) as image:
            refuse_pixels(*image.size, max_pixels)
            several = bool(getattr(image, "is_animated", False))
            _refuse_bands(image, data)
            deep_colours = _has_deep_colours(image, data)
            image.load()
            turned = turn and image.getexif().get(ORIENTATION_TAG, 1) in range(2, 9)
            whole, deep = (_scaled_colours(data, image, white) if deep_colours and white is not None
                           else (image, None))
            upright = ImageOps.exif_transpose(whole) if turned else whole
            shown, facts = to_rgb(upright, white)
            pixels = np.asarray(shown)
    except UnidentifiedImageError:
        reason = reasons.of_file(data)
        known = reason == reasons.HEIF_REMEDY and reads_heif()
        raise Unreadable("is a damaged HEIC file" if known else reason) from None
    except (Unreadable, MemoryError):
        raise
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError,
            TypeError, AttributeError, OverflowError, zlib.error, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(reasons.of_error(reason[:200])) from None
    if deep is not None:
        facts = deep
    elif deep_colours:
        facts = replace(facts, deep=(int(pixels.min()) * 257, int(pixels.max()) * 257))
    return pixels, replace(facts, turned=turned, several=several)


def _refuse_bands(image: Image.Image, data: bytes) -> None:
    """Four bands are colours and transparency only where the file says so: Pillow believes the
    fourth band of a multispectral image to be transparency. Raises: Unreadable."""
    words = "and says of none that it is transparency; keep its red, green and blue alone"
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_PHOTOMETRIC) == 2 and tags.get(_SAMPLES, 1) > 3 and (
                tags.get(_EXTRA, (0,))[0] not in (1, 2)):
            raise Unreadable(f"has {tags[_SAMPLES]} bands {words}")
        if tags.get(_PHOTOMETRIC) == 5 and tags.get(_INKS, 1) != 1:
            raise Unreadable("has inks that are not cyan, magenta, yellow, black; save it as RGB")
    elif image.format == "JPEG2000" and image.mode == "RGBA" and b"cdef" not in data[:1 << 16]:
        raise Unreadable(f"has 4 bands {words}")


def _has_deep_colours(image: Image.Image, data: bytes) -> bool:
    """Colours of 16 bits, of which Pillow drops the lower eight."""
    if image.format == "PNG":
        return data[24] == 16 and data[25] != 0  # IHDR: bit depth, colour type
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS, (1,))  # type: ignore[attr-defined]
        return len(bits) > 2 and bits[0] == 16
    return False


def _scaled_colours(data: bytes, image: Image.Image, white: int) -> tuple[Image.Image, Facts]:
    """8-bit colours of a 16-bit image, `white` and above becoming 255. Raises: Unreadable."""
    import cv2

    values = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    if values.dtype != np.uint16 or values.ndim != 3:
        raise Unreadable("has 16 bits a colour in a form of which only the upper eight can be "
                         "read; save it as RGB, or leave out white")
    colours, facts = _scaled(values[..., 2::-1], white)  # OpenCV: blue, green, red
    seen = np.dstack([colours, values[..., 3:] >> 8]).astype(np.uint8)
    scaled = Image.fromarray(seen)
    scaled.info["exif"] = image.getexif().tobytes()
    return scaled, facts


def _scaled(values: np.ndarray, top: int) -> tuple[np.ndarray, Facts]:
    """16-bit values as 8-bit ones, `top` and above becoming 255."""
    wide = values.astype(np.int64)
    low, high = int(wide.min()), int(wide.max())
    scaled = (np.minimum(wide, top) * 255 + top // 2) // top
    return scaled.astype(np.uint8), Facts(deep=(low, high), clipped=high > top)


def to_rgb(image: Image.Image, white: int | None) -> tuple[Image.Image, Facts]:
    """8-bit RGB as a person would see it. Pillow's own `convert` clips 16-bit values to white and
    uncovers what transparency hides; both are handled here. Raises: Unreadable."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > FULL:
            raise Unreadable("has 32-bit pixels of an unknown range")
        scaled, facts = _scaled(values, white or FULL)
        return Image.fromarray(scaled).convert("RGB"), facts
    if image.mode == "F":
        raise Unreadable("has floating-point pixels of an unknown range")
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        paper = Image.new("RGBA", visible.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, visible).convert("RGB"), Facts()
    return image.convert("RGB"), Facts()
