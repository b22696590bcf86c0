"""Threads that turn plans into batches, in order, bounded, without the GIL.

In: a reader, an iterator of plans, padding. Out: `Batch` after `Batch`, uint8 NHWC.

A planner thread draws the plans of the next batches (NumPy, about a millisecond each); worker
threads carry them out a few images at a time; the iterating thread takes batches in order. The
pixels of a batch depend on its plans alone; neither the number of threads nor their timing shows.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from resnet_dist.data.decode import decoder
from resnet_dist.data.pipeline import compiled_stage
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.run import file_errors

# Images of one task, and where they are small: some ms of work, so that threads end a batch
# together, and a task's own 35 us are little beside it.
_CHUNK, _SMALL_CHUNK = 8, 32


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    step: int  # completed optimizer steps before this batch; for evaluation, its number
    images: torch.Tensor  # uint8 [n, S, S, 3], NHWC contiguous; pinned where CUDA is present
    labels: torch.Tensor  # int64 [n]
    sample_ids: np.ndarray  # int64 [n]
    epochs: np.ndarray  # int64 [n]; with repeated augmentation the views, see `order.batch_of`


@dataclass
class BatchPlan:
    """What a batch will be."""

    step: int
    epochs: np.ndarray
    ids: np.ndarray
    plans: np.ndarray  # PLAN [n]
    size: int


@dataclass
class _Work:
    """A batch in the making."""

    plan: BatchPlan
    images: np.ndarray
    tensor: torch.Tensor
    labels: np.ndarray
    padding: np.ndarray
    chunks: list[Future[None]] = field(default_factory=list)


class _Buffers:
    """Image memory that is used again once nobody can see it: fresh pages cost 5% of a batch.

    Pinned memory comes from torch's own cache, which waits for copies in flight.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._size = 0  # of the memory taken last; other sizes are not kept
        self._lock = threading.RLock()  # the collector may give back while this thread takes
        self._pin = torch.cuda.is_available()

    def take(self, count: int, size: int) -> tuple[np.ndarray, torch.Tensor]:
        """Memory for uint8 [count, size, size, 3] as an array and as a tensor."""
        if self._pin:
            tensor = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=True)
            return tensor.numpy(), tensor
        needed = count * size * size * 3
        with self._lock:
            if needed != self._size:
                self._size = needed
                self._free.clear()
            base = self._free.pop() if self._free else np.empty(needed, np.uint8)
        # The tensor's storage holds `view`; it dies with the last tensor that shares the memory.
        view = base[:]
        weakref.finalize(view, self._give_back, base)
        return base.reshape(count, size, size, 3), torch.from_numpy(view).view(count, size, size, 3)

    def clear(self) -> None:
        """Keep nothing, nor what comes back later."""
        with self._lock:
            self._size = 0
            self._free.clear()

    def _give_back(self, base: np.ndarray) -> None:
        with self._lock:
            if base.size == self._size:
                self._free.append(base)


def _no_padding(size: int) -> np.ndarray:
    raise DataError("the loader is closed")


class Engine:
    """Threads that turn plans into batches, in order, at most `prefetch` ahead."""

    def __init__(self, reader: ShardReader, plans: Iterator[BatchPlan],
                 padding: Callable[[int], np.ndarray], *,
                 threads: int | None, prefetch: int, verify: str):
        self._reader, self._plans, self._padding = reader, plans, padding
        self._check = int(verify == "page")
        self._buffers = _Buffers()
        self._stage = compiled_stage()
        count = threads or len(os.sched_getaffinity(0))
        self._planner = ThreadPoolExecutor(1, "data-planner")
        self._workers = ThreadPoolExecutor(count, "data")
        all_there = threading.Barrier(count)
        for _ in range(count):
            self._workers.submit(all_there.wait)
        self._closed = False
        self._coming = deque(self._planner.submit(self._begin) for _ in range(prefetch))

    def next(self) -> Batch | None:
        """The next batch in order; None at the end. Raises: what went wrong in any thread."""
        if self._closed:
            raise DataError("the loader is closed")
        work = self._coming[0].result()
        if work is None:
            return None
        for chunk in work.chunks:
            chunk.result()
        self._coming.popleft()
        self._coming.append(self._planner.submit(self._begin))
        plan = work.plan
        return Batch(plan.step, work.tensor, torch.from_numpy(work.labels.reshape(-1)), plan.ids,
                     plan.epochs)

    def _begin(self) -> _Work | None:
        plan = next(self._plans, None)
        if plan is None:
            return None
        count = len(plan.ids)
        images, tensor = self._buffers.take(count, plan.size)
        work = _Work(plan, images, tensor, np.empty((count, 1), np.int64), self._padding(plan.size))
        chunk = _SMALL_CHUNK if plan.size <= 112 else _CHUNK
        work.chunks += [self._workers.submit(self._fill, work, start, min(start + chunk, count))
                        for start in range(0, count, chunk)]
        return work

    def _fill(self, work: _Work, start: int, stop: int) -> None:
        reader, plan = self._reader, work.plan
        ids, plans = plan.ids[start:stop], plan.plans[start:stop]
        status = np.zeros(len(ids), np.int32)
        state = (reader.files, reader.sizes, reader.metadata["f2"],
                 plans.view(np.uint8).reshape(len(ids), decoder.PLAN.itemsize), work.padding,
                 status, self._check)
        deadline = time.monotonic() + file_errors.WAIT_S
        while True:
            self._stage(ids, reader.metadata, state, work.images[start:stop],
                        work.labels[start:stop])
            failed = np.flatnonzero(status)
            if not len(failed):
                return
            sample = int(ids[failed[0]])
            if status[failed[0]] == decoder.UNREAD and time.monotonic() < deadline:
                file_errors.waited_out(partial(reader.read_again, sample))
                continue
            raise DataError(f"{reader.describe(sample)}: {decoder.last_error()}; run "
                            f"`resnet-dist verify {reader.dataset} --deep`, then copy or "
                            "convert that shard again")

    def close(self) -> None:
        """End every thread, wait for it, and let go of what was prepared."""
        self._closed = True
        for pool in (self._planner, self._workers):
            pool.shutdown(cancel_futures=True)
        # No cycle may keep memory until the collector happens to run.
        self._plans, self._padding = iter(()), _no_padding
        self._coming.clear()
        self._buffers.clear()
