"""The layout of a shard, one `.beton` as FFCV 1.0.2 reads it, and a look at one with suspicion.

Header, field descriptors, one metadata row a sample, data in pages that no sample straddles, then
the allocation table up to the end of the file (libffcv/ffcv, ffcv/types.py, version 2). The types
are restated here, because importing FFCV takes seconds and hundreds of megabytes in every worker
of a conversion; a test holds them equal to FFCV's. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import xxhash

VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"),
                   ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))],
                 align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("f0", IMAGE), ("f1", "<i8"), ("f2", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FIELDS = (("image", 2), ("label", 1), ("digest", 1))  # name, FFCV's type id
MODE_JPEG, MODE_RAW = 0, 1
MIN_PAGE = 1 << 21  # FFCV refuses to write smaller pages
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


class Damaged(ValueError):
    """A shard that must not be read; the message says why, without the file's name."""


@dataclass(frozen=True)
class ShardIndex:
    """What a shard says of its samples, every pointer proven to lie inside the file."""

    samples: np.ndarray  # SAMPLE [n]
    sizes: np.ndarray  # uint32 [n], stored bytes
    digest: str  # `index_digest`

    @property
    def pointers(self) -> np.ndarray:
        return self.samples["f0"]["data_ptr"]


def digest(data: bytes | memoryview) -> int:
    """XXH3-64 of the stored bytes as a signed 64-bit integer, FFCV's IntField."""
    value = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >> 63 else value


def index_digest(head: bytes, table: bytes) -> str:
    """XXH3-64 of what a shard says about its samples, labels included: cheap to check when opening.

    `head` is the file up to the end of the metadata, `table` its allocation table. The images have
    digests of their own.
    """
    return xxhash.xxh3_64_hexdigest(head + table)


def read_index(file: int) -> ShardIndex:
    """Parse and check the structure of a shard, open as `file`; touches no sample data. Labels may
    be any number. Raises: Damaged."""
    length = os.fstat(file).st_size
    head = read_at(file, 0, METADATA_START)
    if head is None:
        raise Damaged("ends inside its header")
    header = np.frombuffer(head, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise Damaged(f"has format version {header['version']}, expected {VERSION}")
    if header["num_fields"] != len(FIELDS):
        names = ", ".join(name for name, _ in FIELDS)
        raise Damaged(f"has {header['num_fields']} fields, expected {names}")
    for field, (name, type_id) in zip(np.frombuffer(head, FIELD, offset=HEADER.itemsize), FIELDS,
                                      strict=True):
        found = field["name"].tobytes().rstrip(b"\0")
        if found != name.encode() or field["type_id"] != type_id:
            raise Damaged(f"has a field {found!r} of type {field['type_id']}, expected {name!r} of "
                          f"type {type_id}")
    page, count, table_at = (int(header[key]) for key in
                             ("page_size", "num_samples", "alloc_table_ptr"))
    if page < MIN_PAGE or page & (page - 1):
        raise Damaged(f"has page size {page}, expected a power of two of at least {MIN_PAGE}")
    body = METADATA_START + count * SAMPLE.itemsize
    if count < 1 or table_at < body or table_at + count * ALLOCATION.itemsize != length:
        raise Damaged(f"has its allocation table at byte {table_at:,}, which does not fit {count:,}"
                      f" samples and {length:,} bytes")
    rows = read_at(file, METADATA_START, body - METADATA_START)
    listed = read_at(file, table_at, length - table_at)
    if rows is None or listed is None:
        raise Damaged("became shorter while it was read")
    samples = np.frombuffer(rows, SAMPLE)
    sizes = _sizes(samples, np.frombuffer(listed, ALLOCATION), body, table_at, page)
    return ShardIndex(samples, sizes, index_digest(head + rows, listed))


def _sizes(samples: np.ndarray, table: np.ndarray, body: int, table_at: int, page: int
           ) -> np.ndarray:
    """Of every sample. Every allocation lies in the data, none overlap, and every sample points at
    its own."""
    count, starts, sizes = len(samples), table["ptr"], table["size"]
    limit, low = np.uint64(table_at), np.uint64(body)
    bad = (starts < low) | (starts > limit) | (sizes > limit) | (sizes == 0)
    bad |= (sizes > limit - np.minimum(starts, limit)) | (table["sample_id"] >= np.uint64(count))
    if bad.any():
        raise Damaged(f"entry {int(np.argmax(bad))} of its allocation table points outside the "
                      "data")
    by_start = np.argsort(starts, kind="stable")
    ends = (starts + sizes)[by_start]
    if (ends[:-1] > starts[by_start][1:]).any():
        raise Damaged("allocations overlap")
    of_sample = np.full(count, -1, np.int64)
    of_sample[table["sample_id"].astype(np.int64)] = np.arange(count)
    if (of_sample < 0).any():
        raise Damaged(f"sample {int(np.argmax(of_sample < 0))} has no allocation")
    image, sizes = samples["f0"], sizes[of_sample]
    for bad, what in (
        (image["data_ptr"] != starts[of_sample], "points elsewhere than its allocation"),
        (image["mode"] > MODE_RAW, "has an unknown image mode"),
        ((image["width"] == 0) | (image["height"] == 0), "has no pixels"),
        ((image["mode"] == MODE_RAW) & (sizes != 3 * image["width"].astype(np.uint64)
                                        * image["height"]), "is raw but not height x width x 3 "
                                                            "bytes"),
        (sizes > np.uint64(page), "is larger than a page"),
    ):
        if bad.any():
            raise Damaged(f"sample {int(np.argmax(bad))} {what}")
    return sizes.astype(np.uint32)


def read_at(file: int, offset: int, count: int) -> bytes | None:
    """`count` bytes, or None where the file ends before."""
    parts = []
    while count:
        part = os.pread(file, min(count, 1 << 30), offset)
        if not part:
            return None
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)
