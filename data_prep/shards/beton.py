"""Shard files: the layout of one `.beton`, and reading it back with suspicion.

In: stored images with labels, in order. Out: a file that FFCV 1.0.2's `Loader` reads, whose bytes
depend on nothing but its samples. The layout follows FFCV (libffcv/ffcv, ffcv/types.py, version 2):
header, field descriptors, one metadata row a sample, data in pages that no sample straddles, then
the allocation table up to the end of the file. The types are restated here, because importing FFCV
takes seconds and hundreds of megabytes in every worker; a test holds them equal to FFCV's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
USUAL_PAGE = 1 << 23
SMALL_SHARD = 4 * USUAL_PAGE  # bytes of images up to which pages are small
MAX_PAGE = 1 << 31
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True)
class Stored:
    """One image as it lies in a shard: a JPEG stream, or raw RGB pixels [height, width, 3]."""

    mode: int
    width: int
    height: int
    data: bytes
    label: int


def digest(data: bytes | memoryview) -> int:
    """XXH3-64 of the stored bytes as a signed 64-bit integer, FFCV's IntField."""
    value = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >= 1 << 63 else value


def page_size(sizes: Sequence[int]) -> int:
    """Smallest page that FFCV allows and the samples justify: 2 MiB for little data, else 8 MiB,
    and more where one sample alone needs it."""
    page = MIN_PAGE if sum(sizes) <= SMALL_SHARD else USUAL_PAGE
    while page < max(sizes, default=0):
        page *= 2
    if page > MAX_PAGE:
        raise ValueError(f"a sample of {max(sizes)} bytes exceeds FFCV's largest page")
    return page


def data_start(samples: int, page: int) -> int:
    """File offset of the first sample."""
    return -(-(METADATA_START + samples * SAMPLE.itemsize) // page) * page


def layout(sizes: Sequence[int], page: int) -> tuple[list[int], int]:
    """File offset of every sample, and of the allocation table after the last whole page."""
    pointers, at = [], data_start(len(sizes), page)
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


class Damaged(ValueError):
    """A shard that must not be read; the message says why, without the file's name."""


@dataclass(frozen=True)
class ShardIndex:
    """What a shard says of its samples, every pointer proven to lie inside the file."""

    samples: np.ndarray  # SAMPLE [n]
    sizes: np.ndarray  # uint64 [n]
    page_size: int
    table_ptr: int

    @property
    def pointers(self) -> np.ndarray:
        return self.samples["f0"]["data_ptr"]


def read_index(path: Path) -> ShardIndex:
    """Parse and check the structure of a shard; touches no sample data. Raises: Damaged."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        if length < METADATA_START:
            raise Damaged(f"has {length} bytes, a header takes {METADATA_START}")
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        fields = np.frombuffer(file.read(len(FIELDS) * FIELD.itemsize), FIELD)
        count, page = int(header["num_samples"]), int(header["page_size"])
        table_at = int(header["alloc_table_ptr"])
        if int(header["version"]) != VERSION:
            raise Damaged(f"format version {header['version']}, expected {VERSION}")
        if int(header["num_fields"]) != len(FIELDS):
            raise Damaged(f"{header['num_fields']} fields, expected {len(FIELDS)}")
        for field, (name, type_id) in zip(fields, FIELDS, strict=True):
            found = field["name"].tobytes().rstrip(b"\0")
            if found != name.encode() or int(field["type_id"]) != type_id:
                raise Damaged(f"field {found!r} of type {field['type_id']}, expected {name!r}")
            if field["arguments"].any():
                raise Damaged(f"field {name!r} has unexpected arguments")
        if page < MIN_PAGE or page & (page - 1):
            raise Damaged(f"page size {page} is not a power of two of at least {MIN_PAGE}")
        if count < 1 or METADATA_START + count * SAMPLE.itemsize > length:
            raise Damaged(f"{count} samples do not fit into {length} bytes")
        if table_at % page or table_at + count * ALLOCATION.itemsize != length:
            raise Damaged("the allocation table is not where the header says")
        samples = np.frombuffer(file.read(count * SAMPLE.itemsize), SAMPLE)
        file.seek(table_at)
        table = np.frombuffer(file.read(count * ALLOCATION.itemsize), ALLOCATION)
    image = samples["f0"]
    if not np.array_equal(table["sample_id"], np.arange(count)):
        raise Damaged("the allocation table does not list the samples in order")
    if not np.array_equal(table["ptr"], image["data_ptr"]):
        raise Damaged("the allocation table and the metadata disagree about positions")
    sizes = table["size"]
    for wrong, reason in (
        (sizes < 1, "is empty"),
        (sizes > page, "is larger than a page"),
        (image["mode"] > MODE_RAW, "has an unknown mode"),
        ((image["width"] < 1) | (image["height"] < 1), "has no pixels"),
        (samples["f1"] < 0, "has a negative label"),
        ((image["mode"] == MODE_RAW)
         & (sizes != image["height"].astype(np.uint64) * image["width"] * 3),
         "has a size other than its height x width x 3"),
    ):
        if wrong.any():
            raise Damaged(f"sample {int(np.argmax(wrong))} {reason}")
    pointers, end = layout([int(size) for size in sizes], page)
    expected = np.asarray(pointers, np.uint64)
    if end != table_at or not np.array_equal(expected, table["ptr"]):
        where = int(np.argmax(expected != table["ptr"]))
        raise Damaged(f"sample {where} is not where the samples before it end")
    return ShardIndex(samples, sizes, page, table_at)
