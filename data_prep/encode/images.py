"""One image: from the source's bytes to what a shard stores, or the reason why it cannot be.

In: an encoded file, or RGB pixels. Out: a JPEG stream or raw pixels, always RGB or grey, 8 bits, as
a person sees the image: orientation applied, transparency laid over white, 16-bit values scaled,
palettes resolved, CMYK converted, the first frame of several. A JPEG that fits stays as it is but
for restart markers and dropped metadata. Same input, same bytes.

Decoding is strict: where libjpeg would warn and fill in pixels of its own, the image is unreadable.
A JPEG that lacks its end marker, and nothing else, is whole.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from PIL import Image

from data_prep.encode import formats, jpeg, reasons
from data_prep.encode.facts import PLAIN, Facts
from data_prep.encode.formats import refuse_pixels
from data_prep.encode.jpeg import Header, JpegError
from data_prep.sources.found import Unreadable
from resnet_dist.data.shards.beton import MODE_JPEG, MODE_RAW

RAW_ROW = 16  # rows of raw pixels that are measured together, as many as most JPEGs' MCUs have


@dataclass(frozen=True)
class Encoding:
    """How images are stored; recorded in the manifest."""

    image: str  # "jpeg", "raw" or "mixed"
    raw_fraction: float  # of mixed images
    longer_side: int | None
    shorter_side: int | None
    quality: int
    keep: bool
    exif: str  # "apply" or "ignore" the orientation
    max_pixels: int
    white: int | None = None  # of 16-bit images, the value that becomes 255; None: 65,535


@dataclass(frozen=True)
class Encoded:
    mode: int
    width: int
    height: int
    data: bytes
    facts: Facts = PLAIN

    def pixels(self) -> np.ndarray:
        """uint8 RGB [height, width, 3], as a loader will see it."""
        if self.mode == MODE_RAW:
            return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)
        return jpeg.decode(self.data, self.width, self.height)

    def add_row_sums(self, every: int, first: int, totals: np.ndarray) -> int:
        """Add sums and squares of one in `every` rows of blocks to totals [6]; how many pixels."""
        if self.mode == MODE_JPEG:
            return jpeg.add_row_sums(self.data, every, first, totals)
        pixels, count = self.pixels(), 0
        for top in range(first * RAW_ROW, self.height, every * RAW_ROW):
            rows = pixels[top:top + RAW_ROW]
            jpeg.add_sums(rows, totals)
            count += rows.shape[0] * rows.shape[1]
        return count


def encode(raw: bytes | np.ndarray, encoding: Encoding, name: str) -> Encoded:
    """Raises: Unreadable with the reason."""
    as_raw = encoding.image == "raw" or (
        encoding.image == "mixed" and _draw(name) < encoding.raw_fraction)
    try:
        if isinstance(raw, np.ndarray):
            refuse_pixels(raw.shape[1], raw.shape[0], encoding.max_pixels)
            return _stored(_shrunk(raw, encoding), as_raw, encoding, PLAIN)
        if raw[:3] != b"\xff\xd8\xff":
            pixels, facts = formats.decode(raw, encoding.max_pixels, encoding.white,
                                           turn=encoding.exif == "apply")
            return _stored(_shrunk(pixels, encoding), as_raw, encoding, facts)
        try:
            return _of_jpeg(raw, as_raw, encoding)
        except JpegError:
            ended = jpeg.with_end(raw)
            if ended is None:
                raise
            made = _of_jpeg(ended, as_raw, encoding)
            return replace(made, facts=replace(made.facts, unended=True))
    except JpegError as error:
        assert isinstance(raw, bytes)
        raise Unreadable(reasons.of_jpeg(raw, str(error))) from None


def _of_jpeg(raw: bytes, as_raw: bool, encoding: Encoding) -> Encoded:
    """Raises: JpegError, Unreadable."""
    header = jpeg.inspect(raw)
    refuse_pixels(header.width, header.height, encoding.max_pixels)
    upright = header.orientation == 1 or encoding.exif == "ignore"
    facts = PLAIN if upright and not header.several else Facts(
        turned=not upright, several=header.several)
    size = fitted(header.width, header.height, encoding)
    fits = size == (header.width, header.height)
    if encoding.keep and fits and upright and header.is_common and not as_raw:
        return Encoded(MODE_JPEG, *size, jpeg.with_restarts(raw), facts)
    if upright and not as_raw and header.components == 3:
        again = jpeg.reencode(raw, *size, encoding.quality)
        if again is not None:
            return Encoded(MODE_JPEG, *size, again, facts)
    pixels = _decode_jpeg(raw, header, size)
    if not upright:
        pixels = _turned(pixels, header.orientation)
    return _stored(pixels, as_raw, encoding, facts)


def _stored(pixels: np.ndarray, as_raw: bool, encoding: Encoding, facts: Facts) -> Encoded:
    height, width = pixels.shape[:2]
    if as_raw:
        return Encoded(MODE_RAW, width, height, np.ascontiguousarray(pixels).tobytes(), facts)
    return Encoded(MODE_JPEG, width, height, jpeg.encode(pixels, encoding.quality), facts)


def _draw(name: str) -> float:
    """Uniform in [0, 1), a function of the name alone."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"), seed=1) / 2**64


def fitted(width: int, height: int, encoding: Encoding) -> tuple[int, int]:
    """(width, height) within the size limit; images are never enlarged."""
    if encoding.longer_side and max(width, height) > encoding.longer_side:
        limit, side = encoding.longer_side, max(width, height)
    elif encoding.shorter_side and min(width, height) > encoding.shorter_side:
        limit, side = encoding.shorter_side, min(width, height)
    else:
        return width, height
    return max(1, round(width * limit / side)), max(1, round(height * limit / side))


def _shrunk(pixels: np.ndarray, encoding: Encoding) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = fitted(width, height, encoding)
    return pixels if size == (width, height) else jpeg.shrink(pixels, *size)


def _decode_jpeg(data: bytes, header: Header, size: tuple[int, int]) -> np.ndarray:
    """RGB of (width, height) `size`, at most the file's own. CMYK is proven whole by the strict
    decoder first, then converted by Pillow, which knows Adobe's inverted inks."""
    if header.components != 4:
        return jpeg.decode(data, *size)
    jpeg.check(data)
    with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels if size == (header.width, header.height) else jpeg.shrink(pixels, *size)


_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).transpose(_TURNS[orientation]))
