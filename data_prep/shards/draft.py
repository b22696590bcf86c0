"""A shard's file while its images are still being encoded.

Whole pages go to disk as they fill, past the page cache, so that little is left to write and to
wait for at the end. Where a page begins depends on all images of a shard, so a draft guesses: many
bytes, and no image rejected. `commit` checks that, and writes everything anew where it was wrong:
the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.shards.beton import (
    ALLOCATION,
    MIN_PAGE,
    SMALL_SHARD,
    USUAL_PAGE,
    Stored,
    data_start,
    head,
    layout,
    page_size,
)
from data_prep.shards.direct import DirectFile
from resnet_dist.data.shards.digest import index_digest
from resnet_dist.run.atomic import sync_directory, temporary_name

_MOST_BUFFERS = 1024  # of one writev: IOV_MAX


class Draft:
    """One shard of at most `planned` samples. `disk` writes; it runs one job after another."""

    def __init__(self, path: Path, planned: int, disk: Executor | None = None) -> None:
        self.samples: list[Stored] = []
        self._path, self._temporary = path, temporary_name(path)
        self._handle = -1
        self._direct: DirectFile | None = None
        self._disk = disk
        self._bytes = 0
        self._pointers: list[int] = []
        self._at = data_start(planned, USUAL_PAGE)  # where the next sample would begin
        self._sent = 0  # samples given to `disk`
        self._jobs: list[Future[None]] = []

    def add(self, sample: Stored) -> None:
        size = len(sample.data)
        if self._at // USUAL_PAGE != (self._at + size - 1) // USUAL_PAGE:
            self._at = -(-self._at // USUAL_PAGE) * USUAL_PAGE
            if self._disk and self._bytes > SMALL_SHARD:
                self._jobs.append(self._disk.submit(
                    self._write_pages, self.samples[self._sent:], self._pointers[self._sent:]))
                self._sent = len(self.samples)
        self.samples.append(sample)
        self._pointers.append(self._at)
        self._at += size
        self._bytes += size

    def commit(self) -> tuple[int, str, str]:
        """Write what is missing, sync, rename. Returns the file's size, SHA-256 and
        `index_digest`.

        After a crash at any point the path is absent, the old file, or the whole new one.
        """
        sizes = [len(sample.data) for sample in self.samples]
        page = page_size(sizes)
        pointers, table_at = layout(sizes, page)
        table = np.zeros(len(sizes), ALLOCATION)
        table["sample_id"], table["ptr"], table["size"] = np.arange(len(sizes)), pointers, sizes
        first, last = head(self.samples, page, pointers, table_at), table.tobytes()
        try:
            for job in self._jobs:
                job.result()
            done = self._sent
            if pointers[:done] != self._pointers[:done]:
                os.ftruncate(self._open(), 0)
                done = 0
            self._write(self.samples[done:], pointers[done:])
            _write_all(self._open(), [first], 0)
            _write_all(self._open(), [last], table_at)
            sha = _sha256(first, self.samples, pointers, table_at, last)
            os.fsync(self._open())
            self._close()
            os.replace(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise
        sync_directory(self._path.parent)
        return table_at + len(last), sha, index_digest(first, last)

    def discard(self) -> None:
        for job in self._jobs:
            job.cancel()
        with suppress(OSError):
            self._temporary.unlink()
        if all(job.done() for job in self._jobs):
            self._close()

    def _open(self) -> int:
        if self._handle < 0:
            self._path.parent.mkdir(exist_ok=True)
            self._handle = os.open(self._temporary,
                                   os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self._handle

    def _close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write_pages(self, samples: Sequence[Stored], pointers: Sequence[int]) -> None:
        if self._direct is None:
            self._open()
            self._direct = DirectFile(self._temporary, USUAL_PAGE)
        begin, through_cache = 0, False
        for end in range(1, len(samples) + 1):
            if end == len(samples) or pointers[end] % USUAL_PAGE == 0:
                page = [sample.data for sample in samples[begin:end]]
                if self._direct.write(page, pointers[begin]) < sum(map(len, page)):
                    self._write(samples[begin:end], pointers[begin:end])
                    through_cache = True
                begin = end
        if through_cache:
            os.fdatasync(self._handle)

    def _write(self, samples: Sequence[Stored], pointers: Sequence[int]) -> None:
        """Gaps between pages stay holes, which read as the zeros they are."""
        begin = 0
        for end in range(1, len(samples) + 1):
            if end == len(samples) or end - begin == _MOST_BUFFERS or (
                    pointers[end] != pointers[end - 1] + len(samples[end - 1].data)):
                _write_all(self._open(), [sample.data for sample in samples[begin:end]],
                           pointers[begin])
                begin = end


def _write_all(handle: int, buffers: list[bytes], at: int) -> None:
    """However little the system takes at once."""
    written = os.pwritev(handle, buffers, at)
    rest = sum(map(len, buffers)) - written
    if not rest:
        return
    view = memoryview(b"".join(buffers))[written:]
    at += written
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written


def _sha256(first: bytes, samples: Sequence[Stored], pointers: Sequence[int], table_at: int,
            last: bytes) -> str:
    sha, zeros, at = hashlib.sha256(), bytes(MIN_PAGE), 0

    def put(data: bytes, pointer: int) -> None:
        nonlocal at
        while at < pointer:
            gap = zeros[:pointer - at]
            sha.update(gap)
            at += len(gap)
        sha.update(data)
        at += len(data)

    put(first, 0)
    for sample, pointer in zip(samples, pointers, strict=True):
        put(sample.data, pointer)
    put(last, table_at)
    return sha.hexdigest()
