"""Shards on node-local scratch: copied once a node, checked, used again, whatever is killed when.

In: a data set on a shared file system and a scratch folder. Out: a folder with the same shards.
Every process of a node calls `stage`; one copies a shard while the others wait for it. A copy
becomes visible under its name only when its SHA-256 is the manifest's: a name that exists is whole.

Names hold the shard's hash: two data sets, or two versions of one, never meet in a scratch folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from resnet_dist.data.shards.manifest import Manifest, Shard
from resnet_dist.data.shards.reader import DataError, ShardReader

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 8 << 20


def stage(dataset: Path, manifest: Manifest, split: str, scratch: Path,
          progress: Callable[[int, int], None] | None = None) -> Path:
    """A folder whose `shard.file`s are `split` of `dataset` on `scratch`; pass it as `root`.

    `progress` is called with (bytes there, bytes in all) after each shard. What an earlier run left
    is used again when its length is right; its bytes were checked before it got its name.

    Raises: DataError where space is missing, a copy does not match, or `scratch` cannot be written.
    """
    shards = manifest.splits[split].shards
    target = scratch / f"resnet-dist-{os.getuid()}-{_fingerprint(shards)}"  # scratch is shared
    total = sum(shard.bytes for shard in shards)
    try:
        (target / split).mkdir(parents=True, exist_ok=True)
        _require_space(target, shards, dataset)
        there, told = 0, time.monotonic()
        for shard in shards:
            _one(dataset / shard.file, target / shard.file, shard)
            there += shard.bytes
            if progress is not None:
                progress(there, total)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                _log.info("staging %s: %.1f of %.1f GB", split, there / 1e9, total / 1e9)
    except OSError as error:
        remedy = ("free space there or drop data.stage_dir" if error.errno == errno.ENOSPC
                  else "name a folder this user can write, or drop data.stage_dir")
        raise DataError(f"data.stage_dir = {scratch}: {error.strerror} ({error.filename}); "
                        f"{remedy}") from error
    return target


def _fingerprint(shards: tuple[Shard, ...]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]


def _require_space(target: Path, shards: tuple[Shard, ...], dataset: Path) -> None:
    missing = sum(shard.bytes for shard in shards if not _complete(target / shard.file, shard))
    free = shutil.disk_usage(target).free
    if missing > free:
        raise DataError(f"data.stage_dir = {target.parent}: {dataset} needs {missing / 1e9:.1f} GB "
                        f"more and {free / 1e9:.1f} GB are free; use a larger scratch or drop "
                        "data.stage_dir")


def _complete(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.bytes


def _one(source: Path, file: Path, shard: Shard) -> None:
    """Copy one shard unless it is there; processes of the node exclude each other by a lock that
    ends with its holder."""
    if _complete(file, shard):
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _complete(file, shard):  # another process copied it meanwhile
            return
        temporary = file.with_suffix(".tmp")
        found = _copy(source, temporary)
        if found != shard.sha256:
            temporary.unlink()
            raise DataError(f"{source}: its SHA-256 is {found[:12]}..., dataset.json says "
                            f"{shard.sha256[:12]}...; run `resnet-dist verify {source.parents[1]}`,"
                            " then copy or convert this shard again")
        os.replace(temporary, file)
    with suppress(OSError):
        file.with_suffix(".lock").unlink()


def _copy(source: Path, target: Path) -> str:
    """Copy and make durable; the SHA-256 of what was read."""
    digest = hashlib.sha256()
    if not os.access(source, os.R_OK):
        raise DataError(f"{source}: is missing or cannot be read; copy the data set again or run "
                        "`resnet-dist verify`")
    with open(source, "rb", buffering=0) as stream, open(target, "wb", buffering=0) as out:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[out.write(view):]
        os.fsync(out.fileno())
    return digest.hexdigest()


class ReadAhead:
    """Asks the kernel for the bytes of coming samples, so that decoding threads do not wait.

    Single images in random order cost a round trip or more each on a network file system, one
    after the other, and the kernel's own read-ahead fetches neighbours that nobody wants. `fadvise`
    starts a read and returns; a thread asks, because on some file systems it blocks all the same.
    """

    def __init__(self, reader: ShardReader):
        self._reader = reader
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data-readahead")
        self._closed = False

    def want(self, ids: np.ndarray) -> None:
        """Samples of a batch that will be decoded some batches later."""
        self._pool.submit(self._ask, ids)

    def _ask(self, ids: np.ndarray) -> None:
        for sample in ids.tolist():
            if self._closed:
                return
            self._reader.will_need(sample)

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
