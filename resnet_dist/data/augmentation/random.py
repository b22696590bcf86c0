"""Counter-based random numbers: a draw is a function of (seed, epoch, sample, purpose).

In: integers. Out: floats in [0, 1). Pure NumPy, no state, no order of calls.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Purpose(IntEnum):
    """What a draw is for. Numbers are part of the run: never renumber, only add."""

    CROP = 1
    FLIP = 2
    PCA = 3
    JITTER = 4
    ERASE = 5
    RANDAUGMENT = 6
    MIX = 7
    RANDAUGMENT_STRENGTH = 8
    MODEL = 9  # the network's own draws: dropout, stochastic depth
    RANDAUGMENT_FILTER = 10
    TRIVIAL = 11


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of uint32 `counter` [m, 4] under `key`: uint32 [m, 4].

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        low_product = c0 * _MULTIPLIERS[0]
        high_product = c2 * _MULTIPLIERS[1]
        c0 = (high_product >> _HALF) ^ c1 ^ np.uint64(k0)
        c2 = (low_product >> _HALF) ^ c3 ^ np.uint64(k1)
        c1 = high_product & _LOW
        c3 = low_product & _LOW
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, epochs: np.ndarray, ids: np.ndarray, purpose: int,
             count: int) -> np.ndarray:
    """`count` numbers for each (epoch, id): float64 [m, count] in [0, 1), multiples of 2**-32.

    Column j does not depend on `count`. Seeds are 64 bits, epochs and ids 32 bits.
    """
    blocks = -(-count // 4)
    counter = np.empty((len(ids), blocks, 4), np.uint32)
    counter[..., 0] = np.asarray(ids).astype(np.uint32)[:, None]
    counter[..., 1] = np.asarray(epochs).astype(np.uint32)[:, None]
    counter[..., 2] = np.uint32(purpose)
    counter[..., 3] = np.arange(blocks, dtype=np.uint32)
    words = philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.reshape(len(ids), blocks * 4)[:, :count] * 2.0**-32


def normals(seed: int, epochs: np.ndarray, ids: np.ndarray, purpose: int,
            count: int) -> np.ndarray:
    """Standard normal draws, float64 [m, count] (Box and Muller 1958)."""
    pairs = -(-count // 2)
    u = uniforms(seed, epochs, ids, purpose, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log1p(-u[:, 0::2]))
    angle = 2.0 * np.pi * u[:, 1::2]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return both.reshape(len(u), 2 * pairs)[:, :count]


def sample_keys(seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One 64-bit key for each (epoch, id), int64 [m]: what a network's own draws derive from."""
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0] = np.asarray(ids).astype(np.uint32)
    counter[:, 1] = np.asarray(epochs).astype(np.uint32)
    counter[:, 2] = np.uint32(Purpose.MODEL)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return np.ascontiguousarray(words[:, :2]).view(np.int64)[:, 0]
