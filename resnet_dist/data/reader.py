"""Several FFCV shards as one array of samples, mapped, never copied, checked before they are used.

In: a data set directory and a split. Out: per-sample metadata, and one address range that holds
every shard's bytes; pages are shared with every other process of the node that maps them.

Shards are FFCV 1.0.2 files (its header, field and allocation types are imported from it) with
three fields: image (RGBImageField), label (IntField), digest (IntField: XXH3-64 of the stored image
bytes). A shard may come from anywhere, so nothing in it is believed until it fits the file and
the manifest.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resnet_dist.data.ffcv_types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FIELDS,
    METADATA_TYPE,
    FieldDescType,
    HeaderType,
)
from resnet_dist.data.manifest import Manifest, Shard, index_digest, load_manifest
from resnet_dist.data.native import JPEG, RAW

_MIN_PAGE = 1 << 21  # FFCV's smallest page
_PROT_NONE, _MAP_FAILED = 0, ctypes.c_void_p(-1).value
_MADV_WILLNEED = 3
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                       ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class DataError(RuntimeError):
    """Stored data that cannot be used; the message names shard, sample and remedy."""


class ShardReader:
    """One split as one index space. Use as a context manager, or call `close()`.

    Attributes:
        num_samples: samples of the split.
        metadata: FFCV's structured array [n]; f0 image (mode, width, height, data_ptr), f1 label,
            f2 digest. `data_ptr` counts from the start of `data`.
        sizes: uint32 [n], stored bytes of each image.
        data: uint8, every shard at a page boundary; read-only, invalid after `close()`.

    Raises: ConfigError from the manifest; DataError where a shard does not fit it.
    """

    def __init__(self, dataset: Path | str, split: str, *, manifest: Manifest | None = None,
                 root: Path | None = None):
        self.dataset = Path(dataset)
        self.manifest = manifest or load_manifest(self.dataset)
        if split not in self.manifest.splits:
            raise DataError(f"split = {split}: not in {self.dataset}, which has "
                            f"{', '.join(sorted(self.manifest.splits))}")
        self.split = split
        self.shards = self.manifest.splits[split].shards
        self._files = [(root or self.dataset) / shard.file for shard in self.shards]
        self.num_samples = self.manifest.splits[split].samples
        self.first_sample = np.cumsum([0] + [shard.samples for shard in self.shards]).tolist()
        page = mmap.PAGESIZE
        lengths = [-(-shard.bytes // page) * page for shard in self.shards]
        self.bases = np.cumsum([0, *lengths]).tolist()
        self._length = max(self.bases[-1], page)
        self._address: int | None = _map(0, self._length, _PROT_NONE, mmap.MAP_PRIVATE
                                         | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        try:
            self.metadata = np.empty(self.num_samples, METADATA_TYPE)
            self.sizes = np.empty(self.num_samples, np.uint32)
            for index in range(len(self.shards)):
                self._open(index)
        except BaseException:
            self.close()
            raise
        for array in (self.metadata, self.sizes):
            array.setflags(write=False)
        buffer = (ctypes.c_uint8 * self._length).from_address(self._address)
        self.data = np.frombuffer(buffer, np.uint8)
        self.data.setflags(write=False)

    def _open(self, index: int) -> None:
        shard, file = self.shards[index], self._files[index]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{file}: cannot be opened ({error.strerror}); copy the data set again "
                            "or run `resnet-dist verify`") from None
        try:
            metadata, sizes = check_shard(descriptor, file, shard, self.manifest.num_classes)
            assert self._address is not None
            _map(self._address + self.bases[index], shard.bytes, mmap.PROT_READ,
                 mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        finally:
            os.close(descriptor)
        here = slice(self.first_sample[index], self.first_sample[index + 1])
        self.metadata[here] = metadata
        self.metadata["f0"]["data_ptr"][here] += np.uint64(self.bases[index])
        self.sizes[here] = sizes

    def locate(self, sample: int) -> tuple[Path, int]:
        """The shard that holds `sample`, and its number inside that shard."""
        index = bisect.bisect_right(self.first_sample, sample) - 1
        return self._files[index], sample - self.first_sample[index]

    def describe(self, sample: int) -> str:
        file, local = self.locate(sample)
        return f"{file}, sample {local} (sample {sample} of split {self.split!r})"

    def read(self, sample: int) -> np.ndarray:
        """The stored bytes of one image: uint8 view."""
        start = int(self.metadata["f0"]["data_ptr"][sample])
        return self.data[start:start + int(self.sizes[sample])]

    def will_need(self, start: int, end: int) -> None:
        """Ask the kernel to read bytes [start, end) of `data`; `start` is at a page boundary."""
        if self._address is not None:
            _libc.madvise(self._address + start, end - start, _MADV_WILLNEED)

    @property
    def labels(self) -> np.ndarray:
        return self.metadata["f1"]

    def close(self) -> None:
        """Unmap; nothing may touch `data` afterwards."""
        address, self._address = self._address, None
        if address is not None:
            self.data = np.empty(0, np.uint8)
            _libc.munmap(address, self._length)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_shard(descriptor: int, file: Path, shard: Shard,
                num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(metadata [n], stored bytes of each image uint32 [n]) once every number fits the file.

    Raises: DataError naming the file, what is wrong and, where there is one, the sample.
    """
    def refuse(what: str) -> DataError:
        return DataError(f"{file}: {what}; run `resnet-dist verify {file.parents[1]}`, then copy "
                         "or convert this shard again")

    length = os.fstat(descriptor).st_size
    if length != shard.bytes:
        raise refuse(f"is {length:,} bytes, dataset.json says {shard.bytes:,}")
    fixed = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
    head = _read(descriptor, 0, fixed)
    if head is None:
        raise refuse("ends inside its header")
    header = head[:HeaderType.itemsize].view(HeaderType)[0]
    if header["version"] != CURRENT_VERSION:
        raise refuse(f"has format version {header['version']}, expected {CURRENT_VERSION}")
    if header["num_fields"] != len(FIELDS):
        names = ", ".join(name for name, _ in FIELDS)
        raise refuse(f"has {header['num_fields']} fields, expected {names}")
    page_size = int(header["page_size"])
    if page_size < _MIN_PAGE or page_size & (page_size - 1):
        raise refuse(f"has page size {page_size}, expected a power of two of at least {_MIN_PAGE}")
    count = int(header["num_samples"])
    if count != shard.samples:
        raise refuse(f"has {count:,} samples, dataset.json says {shard.samples:,}")
    descriptions = head[HeaderType.itemsize:].view(FieldDescType)
    for description, (name, type_id) in zip(descriptions, FIELDS, strict=True):
        found = description["name"].tobytes().rstrip(b"\0")
        if found != name.encode() or description["type_id"] != type_id:
            raise refuse(f"has a field {found!r} of type {description['type_id']}, expected "
                         f"{name!r} of type {type_id}")
    table_at = int(header["alloc_table_ptr"])
    body = fixed + count * METADATA_TYPE.itemsize
    if table_at < body or table_at + count * ALLOC_TABLE_TYPE.itemsize != length:
        raise refuse(f"has its allocation table at byte {table_at:,}, which does not fit {count:,} "
                     f"samples and {length:,} bytes")
    stored = _read(descriptor, fixed, count * METADATA_TYPE.itemsize)
    table_bytes = _read(descriptor, table_at, count * ALLOC_TABLE_TYPE.itemsize)
    if stored is None or table_bytes is None:
        raise refuse("became shorter while it was read")
    metadata, table = stored.view(METADATA_TYPE), table_bytes.view(ALLOC_TABLE_TYPE)
    _check_table(metadata, table, body, table_at, page_size, num_classes, refuse)
    index = index_digest(head.tobytes() + stored.tobytes(), table_bytes.tobytes())
    if shard.index_xxh3 not in (None, index):
        raise refuse("its labels or metadata are not those that were written")
    of_sample = np.empty(count, np.int64)
    of_sample[table["sample_id"].astype(np.int64)] = np.arange(count)
    return metadata, table["size"][of_sample].astype(np.uint32)


def _check_table(metadata: np.ndarray, table: np.ndarray, body: int, table_at: int, page_size: int,
                 num_classes: int, refuse: Callable[[str], DataError]) -> None:
    """Every allocation lies in the data, none overlap, and every sample points at its own."""
    count = len(metadata)

    starts, sizes = table["ptr"], table["size"]
    limit, low = np.uint64(table_at), np.uint64(body)
    bad = (starts < low) | (starts > limit) | (sizes > limit) | (sizes == 0)
    bad |= (sizes > limit - np.minimum(starts, limit)) | (table["sample_id"] >= np.uint64(count))
    if bad.any():
        entry = int(np.argmax(bad))
        raise refuse(f"entry {entry} of its allocation table points outside the data")
    by_start = np.argsort(starts, kind="stable")
    ends = (starts + sizes)[by_start]
    if (ends[:-1] > starts[by_start][1:]).any():
        raise refuse("allocations overlap")
    of_sample = np.full(count, -1, np.int64)
    of_sample[table["sample_id"].astype(np.int64)] = np.arange(count)
    if (of_sample < 0).any():
        raise refuse(f"sample {int(np.argmax(of_sample < 0))} has no allocation")
    image = metadata["f0"]
    sample_sizes = sizes[of_sample]
    for bad, what in (
        (image["data_ptr"] != starts[of_sample], "points elsewhere than its allocation"),
        ((image["mode"] != JPEG) & (image["mode"] != RAW), "has an unknown image mode"),
        ((image["width"] == 0) | (image["height"] == 0), "has no pixels"),
        ((image["mode"] == RAW) & (sample_sizes != 3 * image["width"].astype(np.uint64)
                                   * image["height"]), "is raw but not height x width x 3 bytes"),
        (sample_sizes > np.uint64(page_size), "is larger than a page"),
        ((metadata["f1"] < 0) | (metadata["f1"] >= num_classes),
         f"has a label outside 0..{num_classes - 1}"),
    ):
        if bad.any():
            raise refuse(f"sample {int(np.argmax(bad))} {what}")


def _read(descriptor: int, offset: int, count: int) -> np.ndarray | None:
    """`count` bytes as uint8, or None where the file ends before."""
    parts = []
    while count:
        part = os.pread(descriptor, min(count, 1 << 30), offset)
        if not part:
            return None
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return np.frombuffer(b"".join(parts), np.uint8)


def _map(address: int, length: int, protection: int, flags: int, descriptor: int) -> int:
    result = _libc.mmap(address or None, length, protection, flags, descriptor, 0)
    if result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise DataError(f"cannot map {length:,} bytes ({os.strerror(number)}); check `ulimit -v` "
                        "and vm.max_map_count, which must exceed the number of shards")
    assert result is not None
    return result
