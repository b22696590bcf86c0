"""The compiled decoder behind ctypes: what one image's plan is, and how a failure reads.

In: addresses and sizes of stored bytes. Out: pixels in the caller's memory. Imports no torch.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import numpy as np

# Mirrors `struct Plan` in native.h. Lengths are source pixels, `shift` is grey levels.
OP = np.dtype([("code", "<i4"), ("args", "<f4", (4,))])
MAX_OPS = 14
PLAN = np.dtype([
    ("top", "<f8"), ("left", "<f8"), ("height", "<f8"), ("width", "<f8"),
    ("flip", "<i4"), ("copy", "<i4"), ("shift", "<f4", (3,)), ("num_ops", "<i4"),
    ("ops", OP, (MAX_OPS,)),
], align=True)


class Op(IntEnum):
    """What may be done to a finished crop; `enum OpCode` in native.h explains the arguments."""

    BRIGHTNESS = 1
    CONTRAST = 2
    COLOR = 3
    SHARPNESS = 4
    AUTO_CONTRAST = 5
    EQUALIZE = 6
    INVERT = 7
    POSTERIZE = 8
    SOLARIZE = 9
    SOLARIZE_ADD = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14
    ROTATE = 15
    SHIFT = 16
    ERASE = 17


JPEG, RAW = 0, 1  # `mode` in FFCV's image metadata
UNREAD = 5  # `decode`'s answer where the file system gave no bytes


@cache
def library() -> ctypes.CDLL:
    """The shared library. Raises: ImportError where it was not built."""
    folder = Path(__file__).parent
    found = PathFinder.find_spec("_native", [str(folder)])
    if found is None or found.origin is None:
        raise ImportError(
            f"{folder}/_native{EXTENSION_SUFFIXES[0]} is missing: the decoder was not compiled. "
            "Install libjpeg62-turbo-dev and libxxhash-dev, then run `pip install -e .` again")
    return ctypes.CDLL(found.origin)


_library = library()
decode = _library.rd_decode
decode.argtypes = [
    ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64,  # bytes; or 0, file descriptor, offset
    ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32,  # size, digest, check
    ctypes.c_int32, ctypes.c_int32, ctypes.c_int32,  # mode, height, width
    ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32,
]  # plan, padding image, output, its height and width
decode.restype = ctypes.c_int32
_library.rd_last_error.restype = ctypes.c_char_p
_library.rd_plan_bytes.restype = ctypes.c_uint64
assert _library.rd_plan_bytes() == PLAN.itemsize, "native.h and PLAN disagree"


def last_error() -> str:
    """Why this thread's latest decode failed."""
    return _library.rd_last_error().decode("utf-8", "replace")


def only_portable(on: bool) -> None:
    """For tests: run the kernels that any processor has, in the whole process."""
    _library.rd_only_portable(int(on))


def decode_one(data: bytes, mode: int, height: int, width: int, plan: np.ndarray,
               out_hw: tuple[int, int], pad: np.ndarray | None = None) -> np.ndarray:
    """Decode one image outside a data set: uint8 [out_h, out_w, 3].

    Raises: ValueError with the decoder's reason.
    """
    stored = np.frombuffer(data, np.uint8)
    plan = np.ascontiguousarray(plan, PLAN).reshape(1)
    out = np.zeros((*out_hw, 3), np.uint8)
    pad = np.zeros_like(out) if pad is None else np.ascontiguousarray(pad, np.uint8)
    if pad.shape != out.shape:
        raise ValueError(f"pad is {pad.shape}, the output {out.shape}")
    status = decode(stored.ctypes.data, -1, 0, stored.size, 0, 0, mode, height, width,
                    plan.ctypes.data, pad.ctypes.data, out.ctypes.data, *out_hw)
    if status:
        raise ValueError(last_error())
    return out
