"""Several FFCV shards as one array of samples, checked before they are used.

In: a data set directory and a split. Out: per-sample metadata, and where each sample's bytes are: a
file and a place in it. Bytes are read, never mapped: a shard that is cut off or whose file system
fails while a run uses it is an error that names the sample, where a mapping would end the process
with SIGBUS. The page cache is shared with every other process of the node all the same, and a
network file system gets one request for an image instead of one for each of its pages.

Shards are FFCV 1.0.2 files with
three fields: image (RGBImageField), label (IntField), digest (IntField: XXH3-64 of the stored image
bytes). A shard may come from anywhere, so nothing in it is believed until it fits the file and
the manifest.
"""

from __future__ import annotations

import bisect
import errno
import os
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np

from resnet_dist.data.shards.beton import SAMPLE, Damaged, ShardIndex, read_at, read_index
from resnet_dist.data.shards.manifest import Manifest, load_manifest
from resnet_dist.run.file_errors import passes

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
            self.metadata = np.empty(self.num_samples, SAMPLE)
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
        file = self._files[index]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            remedy = ("raise `ulimit -n`, or convert to fewer shards with shard_samples"
                      if error.errno in (errno.EMFILE, errno.ENFILE)
                      else "copy the data set again or run `resnet-dist verify`")
            raise DataError(f"{file}: cannot be opened ({error.strerror}); {remedy}") from error
        self._descriptors.append(descriptor)
        found = self._checked(descriptor, index)
        here = slice(self.first_sample[index], self.first_sample[index + 1])
        self.metadata[here], self.sizes[here] = found.samples, found.sizes
        self.files[here] = descriptor

    def _checked(self, descriptor: int, index: int) -> ShardIndex:
        """A shard's index once every number fits the file and the manifest. Raises: DataError."""
        shard, file = self.shards[index], self._files[index]
        try:
            length = os.fstat(descriptor).st_size
            if length != shard.bytes:
                raise Damaged(f"is {length:,} bytes, dataset.json says {shard.bytes:,}")
            found = read_index(descriptor)
            if len(found.samples) != shard.samples:
                raise Damaged(f"has {len(found.samples):,} samples, dataset.json says "
                              f"{shard.samples:,}")
            labels, classes = found.samples["f1"], self.manifest.num_classes
            if (bad := (labels < 0) | (labels >= classes)).any():
                raise Damaged(f"sample {int(np.argmax(bad))} has a label outside 0..{classes - 1}")
            if shard.index_xxh3 not in (None, found.digest):
                raise Damaged("its labels or metadata are not those that were written")
        except Damaged as damage:
            raise DataError(f"{file}: {damage}; run `resnet-dist verify {file.parents[1]}`, then "
                            "copy or convert this shard again") from None
        return found

    def locate(self, sample: int) -> tuple[Path, int]:
        """The shard that holds `sample`, and its number inside that shard."""
        index = self._shard(sample)
        return self._files[index], sample - self.first_sample[index]

    def _shard(self, sample: int) -> int:
        return bisect.bisect_right(self.first_sample, sample) - 1

    def describe(self, sample: int) -> str:
        file, local = self.locate(sample)
        return f"{file}, sample {local} (sample {sample} of split {self.split!r})"

    def read(self, sample: int) -> np.ndarray:
        """The stored bytes of one image: uint8. Raises: DataError where they are not there."""
        start, count = int(self.metadata["f0"]["data_ptr"][sample]), int(self.sizes[sample])
        try:
            stored = read_at(int(self.files[sample]), start, count)
        except OSError as error:
            raise DataError(f"{self.describe(sample)}: cannot be read ({error.strerror}); check "
                            "its file system") from error
        if stored is None:
            raise DataError(f"{self.describe(sample)}: its shard was cut off while in use; copy "
                            "or convert that shard again")
        return np.frombuffer(stored, np.uint8)

    def read_again(self, sample: int) -> np.ndarray:
        """As `read`; where that fails, from the shard opened anew: a handle that a server forgot
        stays stale."""
        try:
            return self.read(sample)
        except DataError as error:
            if not passes(error):
                raise
        index = self._shard(sample)
        file = self._files[index]
        try:
            fresh = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._checked(fresh, index)
                os.dup2(fresh, self._descriptors[index], inheritable=False)
            finally:
                os.close(fresh)
        except OSError as error:
            raise DataError(f"{file}: cannot be opened ({error.strerror}); check its file system"
                            ) from error
        return self.read(sample)

    def will_need(self, sample: int) -> None:
        """Ask the kernel to have the bytes of one image in memory soon."""
        if self._descriptors:
            with suppress(OSError):  # the read itself will tell
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
