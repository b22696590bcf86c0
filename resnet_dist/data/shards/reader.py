"""Several FFCV shards as one array of samples, checked before they are used.

In: a data set directory and a split. Out: per-sample metadata, and where each sample's bytes are: a
file and a place in it. Bytes are read, never mapped: a shard that is cut off or whose file system
fails while a run uses it is an error that names the sample, where a mapping would end the process
with SIGBUS. The page cache is shared with every other process of the node all the same, and a
network file system gets one request for an image instead of one for each of its pages.

Shards are FFCV 1.0.2 files (its header, field and allocation types are imported from it) with
three fields: image (RGBImageField), label (IntField), digest (IntField: XXH3-64 of the stored image
bytes). A shard may come from anywhere, so nothing in it is believed until it fits the file and
the manifest.
"""

from __future__ import annotations

import bisect
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resnet_dist.data.decode.decoder import JPEG, RAW
from resnet_dist.data.shards.digest import index_digest
from resnet_dist.data.shards.ffcv_types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FIELDS,
    METADATA_TYPE,
    FieldDescType,
    HeaderType,
)
from resnet_dist.data.shards.manifest import Manifest, Shard, load_manifest

_MIN_PAGE = 1 << 21  # FFCV's smallest page
_OTHER_FILES = 256  # that a training process may have open besides


class DataError(RuntimeError):
    """Stored data that cannot be used; the message names shard, sample and remedy."""


class ShardReader:
    """One split as one index space. Use as a context manager, or call `close()`.

    Attributes:
        num_samples: samples of the split.
        metadata: FFCV's structured array [n]; f0 image (mode, width, height, data_ptr), f1 label,
            f2 digest. `data_ptr` counts from the start of the sample's shard.
        sizes: uint32 [n], stored bytes of each image.
        files: int32 [n], open file descriptor of each sample's shard; invalid after `close()`.

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
        self._descriptors: list[int] = []
        _allow_files(len(self.shards))
        try:
            self.metadata = np.empty(self.num_samples, METADATA_TYPE)
            self.sizes = np.empty(self.num_samples, np.uint32)
            self.files = np.empty(self.num_samples, np.int32)
            for index in range(len(self.shards)):
                self._open(index)
        except BaseException:
            self.close()
            raise
        for array in (self.metadata, self.sizes, self.files):
            array.setflags(write=False)

    def _open(self, index: int) -> None:
        shard, file = self.shards[index], self._files[index]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            remedy = ("raise `ulimit -n`, or convert to fewer shards with shard_samples"
                      if error.errno in (errno.EMFILE, errno.ENFILE)
                      else "copy the data set again or run `resnet-dist verify`")
            raise DataError(f"{file}: cannot be opened ({error.strerror}); {remedy}") from None
        self._descriptors.append(descriptor)
        metadata, sizes = check_shard(descriptor, file, shard, self.manifest.num_classes)
        here = slice(self.first_sample[index], self.first_sample[index + 1])
        self.metadata[here] = metadata
        self.sizes[here] = sizes
        self.files[here] = descriptor

    def locate(self, sample: int) -> tuple[Path, int]:
        """The shard that holds `sample`, and its number inside that shard."""
        index = bisect.bisect_right(self.first_sample, sample) - 1
        return self._files[index], sample - self.first_sample[index]

    def describe(self, sample: int) -> str:
        file, local = self.locate(sample)
        return f"{file}, sample {local} (sample {sample} of split {self.split!r})"

    def read(self, sample: int) -> np.ndarray:
        """The stored bytes of one image: uint8. Raises: DataError where they are not there."""
        start, count = int(self.metadata["f0"]["data_ptr"][sample]), int(self.sizes[sample])
        try:
            stored = _read(int(self.files[sample]), start, count)
        except OSError as error:
            raise DataError(f"{self.describe(sample)}: cannot be read ({error.strerror}); check "
                            "its file system") from None
        if stored is None:
            raise DataError(f"{self.describe(sample)}: its shard was cut off while in use; copy "
                            "or convert that shard again")
        return stored

    def will_need(self, sample: int) -> None:
        """Ask the kernel to have the bytes of one image in memory soon."""
        if self._descriptors:
            os.posix_fadvise(int(self.files[sample]),
                             int(self.metadata["f0"]["data_ptr"][sample]),
                             int(self.sizes[sample]), os.POSIX_FADV_WILLNEED)

    @property
    def labels(self) -> np.ndarray:
        return self.metadata["f1"]

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files, often 1,024, where ImageNet's shards would exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, soft), hard))


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
