"""From a data set directory to the batches of a run: exact, bounded, without the GIL, no surprises.

In: data set, augmentation, (seed, rank, world, first step). Out: `Batch` after `Batch`, uint8 NHWC.

A planner thread draws the plans of the next batches (NumPy, about a millisecond each); worker
threads carry them out a few images at a time; the iterating thread takes batches in order. The
pixels of a batch depend on its plans alone; neither the number of threads nor their timing shows.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from resnet_dist.config import AugmentConfig
from resnet_dist.data import augment as augmentations
from resnet_dist.data import native, order
from resnet_dist.data.manifest import Manifest, load_manifest
from resnet_dist.data.pipeline import compiled_stage
from resnet_dist.data.reader import DataError, ShardReader
from resnet_dist.data.stage import ReadAhead, stage
from resnet_dist.paths import DatasetPaths

_CHUNK = 8  # images of one task: some ms of work, so that threads end a batch together
_POLL_S = 0.2


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    step: int  # completed optimizer steps before this batch; for evaluation, its number
    images: torch.Tensor  # uint8 [n, S, S, 3], NHWC contiguous; pinned where CUDA is present
    labels: torch.Tensor  # int64 [n]
    sample_ids: np.ndarray  # int64 [n]
    epochs: np.ndarray  # int64 [n]


@dataclass
class _Plan:
    """What a batch will be."""

    step: int
    epochs: np.ndarray
    ids: np.ndarray
    plans: np.ndarray  # PLAN [n]
    size: int


@dataclass
class _Work:
    """A batch in the making."""

    plan: _Plan
    images: np.ndarray
    tensor: torch.Tensor
    labels: np.ndarray
    padding: np.ndarray
    chunks_left: int
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Buffers:
    """Image memory that is used again once nobody can see it: fresh pages cost 5% of a batch.

    Pinned memory comes from torch's own cache, which waits for copies in flight.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._pin = torch.cuda.is_available()

    def take(self, count: int, size: int) -> tuple[np.ndarray, torch.Tensor]:
        """Memory for uint8 [count, size, size, 3] as an array and as a tensor."""
        if self._pin:
            tensor = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=True)
            return tensor.numpy(), tensor
        needed = count * size * size * 3
        with self._lock:
            free = self._free.get(needed)
            base = free.pop() if free else np.empty(needed, np.uint8)
        # The tensor's storage holds `view`; it dies with the last tensor that shares the memory.
        view = base[:]
        weakref.finalize(view, self._give_back, base)
        return base.reshape(count, size, size, 3), torch.from_numpy(view).view(count, size, size, 3)

    def clear(self) -> None:
        with self._lock:
            self._free.clear()

    def _give_back(self, base: np.ndarray) -> None:
        with self._lock:
            if base.size not in self._free:
                self._free = {base.size: []}  # the size changed: let the old ones go
            self._free[base.size].append(base)


def _no_padding(size: int) -> np.ndarray:
    raise DataError("the loader is closed")


class _Engine:
    """Threads that turn plans into batches, in order, at most `prefetch` ahead."""

    def __init__(self, reader: ShardReader, plans: Iterator[_Plan],
                 padding: Callable[[int], np.ndarray], *,
                 threads: int | None, prefetch: int, verify: str):
        self._reader, self._plans, self._padding = reader, plans, padding
        self._check = int(verify == "page")
        self._buffers = _Buffers()
        self._slots = threading.Semaphore(prefetch)
        self._tasks: queue.SimpleQueue[tuple[_Work, int, int] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._news = threading.Condition()
        count = threads or len(os.sched_getaffinity(0))
        self._stage = compiled_stage()
        self._threads = [threading.Thread(target=self._guard, args=(self._plan_ahead,), daemon=True,
                                          name="data-planner")]
        self._threads += [threading.Thread(target=self._guard, args=(self._work,), daemon=True,
                                           name=f"data-{i}") for i in range(count)]
        for thread in self._threads:
            thread.start()

    def next(self) -> Batch | None:
        """The next batch in order; None at the end. Raises: what went wrong in any thread."""
        work = self._wait(self._ready.get)
        if work is None:
            return None
        self._wait(work.done.wait)
        self._slots.release()
        plan = work.plan
        return Batch(plan.step, work.tensor, torch.from_numpy(work.labels), plan.ids, plan.epochs)

    def _wait(self, ask: Callable[..., _Work | bool | None]) -> _Work | None:
        """`ask` until it answers, watching for failures of other threads."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stop.is_set():
                raise DataError("the loader is closed")
            try:
                answer = ask(timeout=_POLL_S)
            except queue.Empty:
                continue
            if answer is not False:
                return answer if isinstance(answer, _Work) else None

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            self._failure = self._failure or error

    def _plan_ahead(self) -> None:
        while not self._stop.is_set():
            if not self._slots.acquire(timeout=_POLL_S):
                continue
            plan = next(self._plans, None)
            if plan is None:
                self._ready.put(None)
                return
            count = len(plan.ids)
            images, tensor = self._buffers.take(count, plan.size)
            starts = range(0, count, _CHUNK)
            work = _Work(plan, images, tensor, np.empty((count, 1), np.int64),
                         self._padding(plan.size), len(starts))
            self._ready.put(work)
            for start in starts:
                self._tasks.put((work, start, min(start + _CHUNK, count)))

    def _work(self) -> None:
        reader = self._reader
        digests = reader.metadata["f2"]
        status = np.zeros(_CHUNK, np.int32)
        while not self._stop.is_set():
            task = self._tasks.get()
            if task is None:
                return
            work, start, stop = task
            plan = work.plan
            ids, plans = plan.ids[start:stop], plan.plans[start:stop]
            state = (reader.data, reader.sizes, digests,
                     plans.view(np.uint8).reshape(len(ids), native.PLAN.itemsize), work.padding,
                     status[:len(ids)], self._check)
            self._stage(ids, reader.metadata, state, work.images[start:stop],
                        work.labels[start:stop])
            failed = np.flatnonzero(status[:len(ids)])
            if len(failed):
                sample = int(ids[failed[0]])
                raise DataError(f"{reader.describe(sample)}: {native.last_error()}; run "
                                f"`resnet-dist verify {reader.dataset} --deep`, then copy or "
                                "convert that shard again")
            with work.lock:
                work.chunks_left -= 1
                last = work.chunks_left == 0
            if last:
                work.labels = work.labels.reshape(-1)
                work.done.set()

    def close(self) -> None:
        """End every thread, wait for it, and let go of what was prepared."""
        self._stop.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        # No cycle may keep memory until the collector happens to run.
        self._plans, self._padding, self._threads = iter(()), _no_padding, []
        self._buffers.clear()
        for waiting in (self._tasks, self._ready):
            while not waiting.empty():
                waiting.get()


class _Loader:
    """What the two loaders share: iteration, closing, the mean as padding."""

    reader: ShardReader
    _engine: _Engine | None = None
    _ahead: ReadAhead | None = None

    def __iter__(self) -> Iterator[Batch]:
        assert self._engine is not None
        while (batch := self._engine.next()) is not None:
            yield batch

    def close(self) -> None:
        """End the threads, then unmap the shards. May be called twice."""
        if self._engine is not None:
            self._engine.close()
        if self._ahead is not None:
            self._ahead.close()
        self.reader.close()

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
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
    it is planned (0: when they are decoded).

    Raises: DataError, when opening or from the iterator, naming shard and sample.
    """

    def __init__(self, dataset: Path | str, split: str, augment: AugmentConfig, *, seed: int,
                 batch_size: int, rank: int = 0, world: int = 1, threads: int | None = None,
                 prefetch: int = 3, verify: str = "page", first_step: int = 0,
                 stage_dir: Path | str | None = None, read_ahead: int = 8,
                 staged: Callable[[int, int], None] | None = None):
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
            self._engine = _Engine(
                self.reader,
                self._plan(augment, seed, batch_size, rank, world, first_step, read_ahead),
                cache(lambda size: padding(self.reader.manifest, paths, augment.normalize, size)),
                threads=threads, prefetch=prefetch, verify=verify)
        except BaseException:
            self.close()
            raise

    def _plan(self, augment: AugmentConfig, seed: int, batch_size: int, rank: int, world: int,
              step: int, read_ahead: int) -> Iterator[_Plan]:
        image, n = self.reader.metadata["f0"], self.num_samples

        def want(later: int) -> None:
            if self._ahead is not None:
                positions = order.batch_slice(later, batch_size, rank, world)
                self._ahead.want(order.stream(seed, n, *positions)[1])

        for later in range(step, step + read_ahead):
            want(later)
        while True:
            want(step + read_ahead)
            start, stop = order.batch_slice(step, batch_size, rank, world)
            epochs, ids = order.stream(seed, n, start, stop)
            size = augmentations.size_at(augment, step * batch_size // n)  # alike on every rank
            plans = augmentations.train_plans(augment, seed, epochs, ids, image["height"][ids],
                                              image["width"][ids], size)
            yield _Plan(step, epochs, ids, plans, size)
            order.permutation(seed, int(epochs[-1]) + 1, n)  # ready before the epoch changes
            step += 1


class EvalLoader(_Loader):
    """One pass over the rank's contiguous share of a split, in order, without augmentation.

    Rank r of R yields samples [r * N // R, (r + 1) * N // R); the last batch may be short.
    `resize` is the shorter side before the `size` centre crop, None the picture as it is.
    Raises: as TrainLoader.
    """

    def __init__(self, dataset: Path | str, split: str, *, resize: int | None, size: int,
                 batch_size: int, rank: int = 0, world: int = 1, threads: int | None = None,
                 prefetch: int = 2, verify: str = "page", views: str = "center"):
        if views != "center":
            raise ValueError(f"views = {views}: expected center")
        self.reader = ShardReader(dataset, split)
        self.num_samples = self.reader.num_samples
        black = np.zeros((size, size, 3), np.uint8)  # a centre crop never leaves the picture
        try:
            self._engine = _Engine(self.reader, self._plan(resize, size, batch_size, rank, world),
                                   lambda _: black, threads=threads, prefetch=prefetch,
                                   verify=verify)
        except BaseException:
            self.close()
            raise

    def _plan(self, resize: int | None, size: int, batch_size: int, rank: int,
              world: int) -> Iterator[_Plan]:
        image, n = self.reader.metadata["f0"], self.num_samples
        first, last = rank * n // world, (rank + 1) * n // world
        for number, start in enumerate(range(first, last, batch_size)):
            ids = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            plans = augmentations.center_crop(image["height"][ids], image["width"][ids], resize,
                                              size)
            yield _Plan(number, np.zeros(len(ids), np.int64), ids, plans, size)


def normalization(manifest: Manifest, paths: DatasetPaths, normalize: str,
                  size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, 1 / std) float32, broadcastable to [n, 3, size, size], for images in [0, 1].

    Raises: DataError where `normalize` is "pixel" and the mean image is missing, damaged, or not
    `size` square.
    """
    if normalize == "pixel":
        image = _pixel_mean(manifest, paths, size) / np.float32(255)
        return (np.ascontiguousarray(image.transpose(2, 0, 1)[None]),
                np.ones((1, 3, 1, 1), np.float32))
    mean = np.asarray(manifest.mean, np.float32).reshape(1, 3, 1, 1)
    if normalize == "mean":
        return mean, np.ones_like(mean)
    if min(manifest.std) <= 0:
        raise DataError(f"augment.normalize = channel: {paths.manifest} records standard "
                        f"deviations {manifest.std}; use augment.normalize=mean")
    inverse = 1.0 / np.asarray(manifest.std, np.float64)
    return mean, inverse.astype(np.float32).reshape(1, 3, 1, 1)


def padding(manifest: Manifest, paths: DatasetPaths, normalize: str, size: int) -> np.ndarray:
    """What pixels outside a picture show: uint8 [size, size, 3], 0 (+-1/510) once normalised.

    The paper pads with zeros what already had its mean subtracted; subtraction here comes after the
    crop, so the padding is the mean (with normalize "pixel", the mean image where it will be
    subtracted), rounded to a grey level.
    """
    mean, _ = normalization(manifest, paths, normalize, size)
    image = np.broadcast_to(mean * 255, (1, 3, size, size))[0].transpose(1, 2, 0)
    return np.ascontiguousarray(np.rint(image).astype(np.uint8))


def _pixel_mean(manifest: Manifest, paths: DatasetPaths, size: int) -> np.ndarray:
    try:
        image = np.load(paths.pixel_mean, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"augment.normalize = pixel: {paths.pixel_mean} cannot be read ({error}); "
                        "use augment.normalize=mean or convert again") from None
    if image.shape != (size, size, 3):
        raise DataError(f"augment.normalize = pixel: the mean image is {image.shape[0]} x "
                        f"{image.shape[1]}, augment.size = {size}; use augment.normalize=mean")
    return image.astype(np.float32)


__all__ = ["Batch", "DataError", "EvalLoader", "TrainLoader", "load_manifest", "normalization",
           "padding"]
