"""A shard's file: whole under its name, or absent; its bytes depend on nothing but its samples.

A shard is written once and seldom read again at once. Through the page cache its bytes would be
copied into memory that the kernel has to find first, which has cost a sixth of a conversion
(docs/speed-log.md), and push out what others want to read. So whole blocks go past it, where the
file system can.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_dist.data.shards.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    METADATA_START,
    MIN_PAGE,
    SAMPLE,
    VERSION,
    digest,
    index_digest,
)
from resnet_dist.run.atomic import replacing

USUAL_PAGE = 1 << 23
SMALL_SHARD = 4 * USUAL_PAGE  # bytes of images up to which pages are small
MAX_PAGE = 1 << 31


@dataclass(frozen=True)
class Stored:
    """One image as it lies in a shard: a JPEG stream, or raw RGB pixels [height, width, 3]."""

    mode: int
    width: int
    height: int
    data: bytes
    label: int


def write_shard(path: Path, samples: Sequence[Stored]) -> tuple[int, str, str]:
    """Make the file; its size, SHA-256 and `index_digest`. Raises: OSError.

    After a crash at any point the path is absent, the old file, or the whole new one.
    """
    sizes = [len(sample.data) for sample in samples]
    page = page_size(sizes)
    pointers, table_at = layout(sizes, page)
    table = np.zeros(len(sizes), ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = np.arange(len(sizes)), pointers, sizes
    first, last = head(samples, page, pointers, table_at), table.tobytes()
    parts = [(0, first), *zip(pointers, (sample.data for sample in samples), strict=True),
             (table_at, last)]
    sha = hashlib.sha256()
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary, open(temporary, "xb", buffering=0) as file:
        with suppress(OSError):  # tmpfs before Linux 6.6, some network file systems
            _set_direct(file.fileno(), True)
        for block in _blocks(parts):
            sha.update(block)
            _write_all(file.fileno(), block)
        os.fsync(file.fileno())
    return table_at + len(last), sha.hexdigest(), index_digest(first, last)


def page_size(sizes: Sequence[int]) -> int:
    """Smallest page that FFCV allows and the samples justify: 2 MiB for little data, else 8 MiB,
    and more where one sample alone needs it."""
    page = MIN_PAGE if sum(sizes) <= SMALL_SHARD else USUAL_PAGE
    while page < max(sizes, default=0):
        page *= 2
    if page > MAX_PAGE:
        raise ValueError(f"a sample of {max(sizes)} bytes exceeds FFCV's largest page")
    return page


def layout(sizes: Sequence[int], page: int) -> tuple[list[int], int]:
    """File offset of every sample, and of the allocation table after the last whole page."""
    pointers, at = [], -(-(METADATA_START + len(sizes) * SAMPLE.itemsize) // page) * page
    for size in sizes:
        if at // page != (at + size - 1) // page:
            at = -(-at // page) * page
        pointers.append(at)
        at += size
    return pointers, -(-at // page) * page


def head(samples: Sequence[Stored], page: int, pointers: Sequence[int], table: int) -> bytes:
    """Header, field descriptors and metadata."""
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), page
    header["num_samples"], header["alloc_table_ptr"] = len(samples), table
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][:len(name)] = np.frombuffer(name.encode(), np.uint8)
    rows = np.zeros(len(samples), SAMPLE)
    image = rows["f0"]
    image["mode"] = [sample.mode for sample in samples]
    image["width"] = [sample.width for sample in samples]
    image["height"] = [sample.height for sample in samples]
    image["data_ptr"] = pointers
    rows["f1"] = [sample.label for sample in samples]
    rows["f2"] = [digest(sample.data) for sample in samples]
    return header.tobytes() + fields.tobytes() + rows.tobytes()


def _blocks(parts: Iterable[tuple[int, bytes]]) -> Iterator[memoryview]:
    """The file, zeros between its parts (offset, bytes), in aligned blocks of one buffer."""
    buffer = memoryview(mmap.mmap(-1, USUAL_PAGE))
    at = 0
    for pointer, data in parts:
        for piece in (memoryview(bytes(pointer - at)), memoryview(data)):
            while piece:
                place = at % USUAL_PAGE
                count = min(len(piece), USUAL_PAGE - place)
                buffer[place:place + count] = piece[:count]
                piece, at = piece[count:], at + count
                if at % USUAL_PAGE == 0:
                    yield buffer
    yield buffer[:at % USUAL_PAGE]


def _write_all(handle: int, block: memoryview) -> None:
    """However little the system takes at once; through the page cache from where it has to be."""
    if len(block) % mmap.PAGESIZE:
        _set_direct(handle, False)
    while block:
        try:
            block = block[os.write(handle, block):]
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not _set_direct(handle,
                                                                                      False):
                raise


def _set_direct(handle: int, on: bool) -> bool:
    """Whether that changed anything. Raises: OSError where the file system cannot."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
    return flags != wanted
