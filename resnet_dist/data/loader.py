"""From a data set directory to the batches of a run: exact, bounded, no surprises.

In: data set, augmentation, (seed, rank, world, first step). Out: `Batch` after `Batch`, uint8 NHWC.

This file says which samples a batch holds and how each will look; `engine.py` makes it so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data import order
from resnet_dist.data.augmentation import plans as augmentations
from resnet_dist.data.augmentation.normalize import padding
from resnet_dist.data.engine import Batch, BatchPlan, Engine
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.data.shards.stage import ReadAhead, stage
from resnet_dist.run.paths import DatasetPaths

__all__ = ["Batch", "DataError", "EvalLoader", "TrainLoader"]


class _Loader:
    """What the two loaders share: iteration, closing, the mean as padding."""

    reader: ShardReader
    _engine: Engine | None = None
    _ahead: ReadAhead | None = None

    def __iter__(self) -> Iterator[Batch]:
        assert self._engine is not None
        yield from iter(self._engine.next, None)  # which keeps no batch while it waits for the next

    def close(self) -> None:
        """End the threads, then close the shards. May be called twice."""
        if self._engine is not None:
            self._engine.close()
        if self._ahead is not None:
            self._ahead.close()
        self.reader.close()

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(dataset: Path, split: str, stage_dir: Path | str | None,
          staged: Callable[[int, int], None] | None) -> ShardReader:
    if stage_dir is None:
        return ShardReader(dataset, split)
    manifest = load_manifest(dataset)
    if split not in manifest.splits:
        return ShardReader(dataset, split, manifest=manifest)  # refuses, with the splits there are
    scratch = Path(os.path.expandvars(stage_dir)).expanduser()
    return ShardReader(dataset, split, manifest=manifest,
                       root=stage(dataset, manifest, split, scratch, staged))


class TrainLoader(_Loader):
    """Batches first_step, first_step + 1, ... of an endless run, this rank's slice of each.

    Yields `Batch` with n = batch_size / world images. Position p of the stream is
    `order.permutation(seed, p // N)[p % N]`; step s takes positions [s * batch_size, (s + 1) *
    batch_size), so a batch may straddle two epochs and none is ever short.

    Args: `threads` None takes the cores this process may use; `verify` "page" compares each image
    with its recorded hash, "open" trusts the bytes; `prefetch` batches are prepared ahead;
    `stage_dir` is node-local scratch that the shards are copied to first, and `staged` is told of
    each (bytes there, bytes in all); the bytes of a batch are asked for `read_ahead` batches before
    it is planned (0: when they are decoded); `repeats` and `groups` are repeated augmentation, see
    `order.batch_of`.

    Raises: DataError, when opening or from the iterator, naming shard and sample.
    """

    def __init__(self, dataset: Path | str, split: str, augment: AugmentConfig, *, seed: int,
                 batch_size: int, rank: int = 0, world: int = 1, threads: int | None = None,
                 prefetch: int = 3, verify: str = "page", first_step: int = 0,
                 stage_dir: Path | str | None = None, read_ahead: int = 8,
                 staged: Callable[[int, int], None] | None = None, repeats: int = 1,
                 groups: int = 1):
        if batch_size % world:
            raise ValueError(f"batch_size = {batch_size}: must be a multiple of {world} ranks")
        self.reader = _open(Path(dataset), split, stage_dir, staged)
        self.num_samples = self.reader.num_samples
        self._ahead = ReadAhead(self.reader) if read_ahead else None
        try:
            if not self.num_samples:
                raise DataError(f"data.path = {dataset}: split {split!r} is empty; convert it "
                                "again")
            paths = DatasetPaths(Path(dataset))
            self._engine = Engine(
                self.reader,
                self._plan(augment, seed, partial(
                    order.batch_of, seed, self.num_samples, batch_size=batch_size, rank=rank,
                    world=world, repeats=repeats, groups=groups),
                    batch_size, first_step, read_ahead),
                cache(lambda size: padding(self.reader.manifest, paths, augment.normalize, size)),
                threads=threads, prefetch=prefetch, verify=verify)
        except BaseException:
            self.close()
            raise

    def _plan(self, augment: AugmentConfig, seed: int,
              batch_of: Callable[[int], tuple[np.ndarray, np.ndarray]], batch_size: int,
              step: int, read_ahead: int) -> Iterator[BatchPlan]:
        image, n = self.reader.metadata["f0"], self.num_samples

        def want(later: int) -> None:
            if self._ahead is not None:
                self._ahead.want(batch_of(later)[1])

        for later in range(step, step + read_ahead):
            want(later)
        while True:
            want(step + read_ahead)
            views, ids = batch_of(step)
            size = augmentations.size_at(augment, step * batch_size // n)  # alike on every rank
            plans = augmentations.train_plans(augment, seed, views, ids, image["height"][ids],
                                              image["width"][ids], size)
            yield BatchPlan(step, views, ids, plans, size)
            # Ready before the epoch changes.
            order.permutation(seed, ((step + 1) * batch_size - 1) // n + 1, n)
            step += 1


class EvalLoader(_Loader):
    """One pass over the rank's contiguous share of a split, in order, without augmentation.

    Rank r of R yields samples [r * N // R, (r + 1) * N // R); the last batch may be short.
    `resize` is the shorter side before the `size` centre crop, None the picture as it is. Ten crops
    and several scales are `resnet_dist/evaluate/views.py`'s.
    Raises: as TrainLoader.
    """

    def __init__(self, dataset: Path | str, split: str, *, resize: int | None, size: int,
                 batch_size: int, rank: int = 0, world: int = 1, threads: int | None = None,
                 prefetch: int = 2, verify: str = "page"):
        self.reader = ShardReader(dataset, split)
        self.num_samples = self.reader.num_samples
        black = np.zeros((size, size, 3), np.uint8)  # a centre crop never leaves the picture
        try:
            self._engine = Engine(self.reader, self._plan(resize, size, batch_size, rank, world),
                                   lambda _: black, threads=threads, prefetch=prefetch,
                                   verify=verify)
        except BaseException:
            self.close()
            raise

    def _plan(self, resize: int | None, size: int, batch_size: int, rank: int,
              world: int) -> Iterator[BatchPlan]:
        image, n = self.reader.metadata["f0"], self.num_samples
        first, last = rank * n // world, (rank + 1) * n // world
        for number, start in enumerate(range(first, last, batch_size)):
            ids = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            plans = augmentations.center_crop(image["height"][ids], image["width"][ids], resize,
                                              size)
            yield BatchPlan(number, np.zeros(len(ids), np.int64), ids, plans, size)
