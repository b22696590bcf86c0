"""The native JPEG functions as Python ones: bytes and arrays in, bytes and arrays out.

They hold no Python lock while they work. `native/*.cpp` have the contracts.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)  # stuffing and restarts are none
_END = 0xD9
_NOT_PLAIN = -2  # kNotPlain of native/codec.h


class JpegError(ValueError):
    """A JPEG that libjpeg could only decode by making pixels up, or not at all."""


class _Info(ctypes.Structure):
    _fields_ = [("width", c_int32), ("height", c_int32), ("components", c_int32),
                ("precision", c_int32), ("sof", c_int32), ("h", c_int32 * 4), ("v", c_int32 * 4),
                ("exif_at", c_int64), ("exif_size", c_int64), ("several", c_int32)]


@cache
def _library() -> ctypes.CDLL:
    folder = Path(__file__).parent
    found = PathFinder.find_spec("_native", [str(folder)])
    if found is None or found.origin is None:
        raise ImportError(f"{folder / '_native'}: the native part is not built; run "
                          "`pip install -e .` in the project")
    library = ctypes.CDLL(found.origin)
    sizes = ("dp_add_restarts", "dp_transcode", "dp_encode", "dp_reencode", "dp_row_sums")
    for names, result in ((sizes, c_int64), (("dp_last_error",), c_char_p),
                          (("dp_free", "dp_shrink", "dp_sums"), None)):
        for name in names:
            if not hasattr(library, name):
                raise ImportError(f"{found.origin}: is older than the code that calls it; run "
                                  "`pip install -e .` in the project again")
            getattr(library, name).restype = result
    return library


@dataclass(frozen=True)
class Header:
    """What a JPEG's headers say, none of it decoded."""

    width: int
    height: int
    components: int
    precision: int  # bits a sample
    process: int  # low byte of the SOF marker: 0xC0 baseline, 0xC2 progressive, ...
    sampling: tuple[tuple[int, int], ...]  # (horizontal, vertical) of every component
    orientation: int  # EXIF, 1: upright
    several: bool  # more pictures follow this one (MPO)

    @property
    def is_common(self) -> bool:
        """8 bits, Huffman-coded, grey or with chroma sampled as TurboJPEG knows it."""
        layouts = {((1, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1)),
                   ((1, 2), (1, 1), (1, 1)), ((4, 1), (1, 1), (1, 1))}
        return (self.precision == 8 and self.process in (0xC0, 0xC1, 0xC2)
                and (self.components == 1 or self.sampling in layouts))


def _checked(result: int) -> int:
    """What a native function returned. Raises: JpegError, where it failed."""
    if result < 0:
        raise JpegError(_library().dp_last_error().decode("utf-8", "replace"))
    return result


def _address(array: np.ndarray) -> c_void_p:
    return array.ctypes.data_as(c_void_p)


def inspect(data: bytes) -> Header:
    """Raises: JpegError."""
    info = _Info()
    _checked(_library().dp_inspect(data, c_int64(len(data)), byref(info)))
    return Header(width=info.width, height=info.height, components=info.components,
                  precision=info.precision, process=info.sof,
                  sampling=tuple(zip(info.h, info.v, strict=True))[:info.components],
                  orientation=_orientation(data[info.exif_at:info.exif_at + info.exif_size]),
                  several=bool(info.several))


def _orientation(exif: bytes) -> int:
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF is as good as none: Pillow raises anything here
        return 1
    return value if value in range(1, 9) else 1


def has_end(data: bytes) -> bool:
    """Whether an end marker stands where the decoder would look for it."""
    return any(marker == _END for marker, _ in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and what they hold, without entropy-coded data, up to the end or a damage."""
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        marker, at = match[1][0], match.end()
        if marker == _END:
            yield marker, b""
            return
        if marker in (0x01, 0xD8):
            continue
        length = int.from_bytes(data[at:at + 2], "big")
        if length < 2 or at + length > len(data):
            return
        yield marker, data[at + 2:at + length]
        at += length


def with_end(data: bytes) -> bytes | None:
    """`data` with the end marker that it lacks; None where it has one, or where its scans leave out
    a bit of any coefficient, as a progressive file does that was cut between two of them.

    That the last scan is whole, too, is for the strict decoder to say of what is returned: it asks
    for all bits that the image's blocks need, and fails without. Zeros in place of a lost end could
    pass for blocks, so a file that ends in them is not mended.
    """
    lowest: dict[int, list[int]] = {}  # bit that was sent, of every component and coefficient
    try:
        for marker, body in _segments(data):
            if marker == _END:
                return None
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                lowest = {body[6 + 3 * c]: [16] * 64 for c in range(body[5])}
            elif marker == 0xDA:
                first, last, bits = body[1 + 2 * body[0]:4 + 2 * body[0]]
                for component in body[1:1 + 2 * body[0]:2]:
                    lowest[component][first:last + 1] = [bits & 15] * (last + 1 - first)
    except (IndexError, KeyError, ValueError):
        return None
    if not lowest or any(map(any, lowest.values())) or data.endswith(bytes(8)):
        return None
    return data.removesuffix(b"\xff") + b"\xff\xd9"


def _take(pointer: c_void_p, size: int) -> bytes:
    try:
        return ctypes.string_at(pointer.value or 0, size)
    finally:
        _library().dp_free(pointer)


def with_restarts(data: bytes) -> bytes:
    """The same image, losslessly, as a baseline stream with a restart marker a row of MCUs.

    Raises: JpegError where the stream is damaged.
    """
    out = c_void_p()
    for standard_dc in (0, 1):
        size = _library().dp_add_restarts(data, c_int64(len(data)), standard_dc, byref(out))
        if size >= 0:
            return _take(out, size)
    return _take(out, _checked(_library().dp_transcode(data, c_int64(len(data)), byref(out))))


def decode(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 RGB [height, width, 3]; smaller than the file's own size: area-averaged.

    Raises: JpegError, also where libjpeg would only warn and invent pixels.
    """
    out = np.empty((height, width, 3), np.uint8)
    _checked(_library().dp_decode(data, c_int64(len(data)), c_int(width), c_int(height),
                                  _address(out)))
    return out


def reencode(data: bytes, width: int, height: int, quality: int) -> bytes | None:
    """A JPEG shrunk to (width, height) by averaging areas, as `encode` would store it, without a
    detour over RGB; None where its colours need one.

    Raises: JpegError as `decode`.
    """
    out = c_void_p()
    size = _library().dp_reencode(data, c_int64(len(data)), c_int(width), c_int(height),
                                  c_int(quality), byref(out))
    return None if size == _NOT_PLAIN else _take(out, _checked(size))


def check(data: bytes) -> None:
    """Decode a JPEG of any colours to nowhere. Raises: JpegError where it is not whole."""
    _checked(_library().dp_decode(data, c_int64(len(data)), 0, 0, None))


def shrink(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Area-averaged uint8 RGB [height, width, 3]; neither side may grow."""
    assert width <= pixels.shape[1], (width, pixels.shape)
    assert height <= pixels.shape[0], (height, pixels.shape)
    pixels = np.ascontiguousarray(pixels)
    out = np.empty((height, width, 3), np.uint8)
    _library().dp_shrink(_address(pixels), c_int(pixels.shape[1]), c_int(pixels.shape[0]),
                         c_int(width), c_int(height), _address(out))
    return out


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """4:2:0 baseline JPEG of uint8 RGB [height, width, 3], a restart marker a row of MCUs."""
    pixels = np.ascontiguousarray(pixels)
    out = c_void_p()
    size = _library().dp_encode(_address(pixels), c_int(pixels.shape[1]), c_int(pixels.shape[0]),
                                c_int(quality), byref(out))
    return _take(out, _checked(size))


def add_sums(pixels: np.ndarray, totals: np.ndarray) -> None:
    """Add sums and sums of squares per channel of uint8 RGB pixels to int64 totals [6]."""
    pixels = np.ascontiguousarray(pixels)
    _library().dp_sums(_address(pixels), c_int64(pixels.size // 3), _address(totals))


def add_row_sums(data: bytes, every: int, first: int, totals: np.ndarray) -> int:
    """The same of every so-manieth row of MCUs, from `first` on, of a JPEG with a restart marker a
    row, none of its other rows decoded. Returns the number of pixels.

    Raises: JpegError as `decode`.
    """
    return _checked(_library().dp_row_sums(data, c_int64(len(data)), c_int(every), c_int(first),
                                           _address(totals)))


def libjpeg_version() -> str:
    """Of the libjpeg-turbo that the native part was built with, e.g. "2.1.5"."""
    number = int(_library().dp_libjpeg_version())
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
