"""Writing past the page cache, where the file system can.

A shard is written once and seldom read again at once. Through the page cache its bytes would be
copied into memory that the kernel has to find first, which has cost a sixth of a conversion
(docs/speed-log.md), and push out what others want to read. What is written here still needs an
fsync, for the file's metadata and the disk's own cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

BLOCK = 4096  # what addresses, offsets and lengths are multiples of; no disk here asks for more
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectFile:
    """A second handle on a file that exists. Its buffer, of `most` bytes, is made when needed."""

    def __init__(self, path: Path, most: int) -> None:
        self._most = most
        self._buffer: mmap.mmap | None = None
        self._handle = -1
        with suppress(OSError):  # tmpfs before Linux 6.6, some network file systems
            self._handle = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, buffers: Sequence[bytes], at: int) -> int:
        """Write them one after another at `at`, a multiple of BLOCK, and zeros up to the next one.

        Returns how many of their bytes are written: 0 where this is not possible here. Fewer than
        all: the rest has to go another way.
        """
        size = sum(map(len, buffers))
        if self._handle < 0 or size > self._most or at % BLOCK:
            return 0
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, -(-self._most // BLOCK) * BLOCK)
        self._buffer.seek(0)
        for data in buffers:
            self._buffer.write(data)
        padded = -(-size // BLOCK) * BLOCK
        self._buffer.write(bytes(padded - size))
        try:
            with memoryview(self._buffer) as whole, whole[:padded] as view:
                return min(os.pwrite(self._handle, view, at), size)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self.close()
            return 0

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
