"""Threads that turn plans into batches, in order, bounded, without the GIL.

In: a reader, an iterator of plans, padding. Out: `Batch` after `Batch`, uint8 NHWC.

A planner thread draws the plans of the next batches (NumPy, about a millisecond each); worker
threads carry them out a few images at a time; the iterating thread takes batches in order. The
pixels of a batch depend on its plans alone; neither the number of threads nor their timing shows.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from resnet_dist.data.decode import decoder
from resnet_dist.data.pipeline import compiled_stage
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.run import file_errors

_CHUNK = 8  # images of one task: some ms of work, so that threads end a batch together
_POLL_S = 0.2


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
    chunks_left: int
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


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
        self._slots = threading.Semaphore(prefetch)
        self._tasks: queue.SimpleQueue[tuple[_Work, int, int] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
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
            self._hand_out(plan)

    def _hand_out(self, plan: BatchPlan) -> None:
        count = len(plan.ids)
        images, tensor = self._buffers.take(count, plan.size)
        starts = range(0, count, _CHUNK)
        work = _Work(plan, images, tensor, np.empty((count, 1), np.int64),
                     self._padding(plan.size), len(starts))
        self._ready.put(work)
        for start in starts:
            self._tasks.put((work, start, min(start + _CHUNK, count)))

    def _work(self) -> None:
        status = np.zeros(_CHUNK, np.int32)
        while not self._stop.is_set():
            task = self._tasks.get()
            if task is None:
                return
            self._fill(*task, status)
            del task  # or a thread that waits keeps the memory of a batch

    def _fill(self, work: _Work, start: int, stop: int, status: np.ndarray) -> None:
        reader, plan = self._reader, work.plan
        ids, plans = plan.ids[start:stop], plan.plans[start:stop]
        state = (reader.files, reader.sizes, reader.metadata["f2"],
                 plans.view(np.uint8).reshape(len(ids), decoder.PLAN.itemsize), work.padding,
                 status[:len(ids)], self._check)
        deadline = time.monotonic() + file_errors.WAIT_S
        while True:
            self._stage(ids, reader.metadata, state, work.images[start:stop],
                        work.labels[start:stop])
            failed = np.flatnonzero(status[:len(ids)])
            if not len(failed):
                break
            sample = int(ids[failed[0]])
            if status[failed[0]] == decoder.UNREAD and time.monotonic() < deadline:
                file_errors.waited_out(partial(reader.read_again, sample))
                continue
            raise DataError(f"{reader.describe(sample)}: {decoder.last_error()}; run "
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
