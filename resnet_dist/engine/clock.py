"""Where the time of a step goes: waiting for data, waiting for other ranks, computing.

In: the loop's own marks on the wall clock, and what the engine measured of its communication.
Out: means a step since the last logging step. Nothing here waits for a device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PAIRS = 256  # of events at most: only rank 0 reads them, and they must not pile up elsewhere


class Clock:
    """Wall time of the steps since the last logging step, evaluations and pictures left out."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._began, self._step, self._waited_s = time.perf_counter(), step, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the step waits for data."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def speed(self, step: int, batch_size: int, communication: dict[str, float]
              ) -> dict[str, float]:
        """images_per_s of all ranks; means a step in seconds: step_s, data_s (waiting for data)
        and, where the engine knows its communication, that and compute_s, which is the rest.

        communication: comm_s, from the first exchange of a step to its last, and comm_exposed_s,
        the part of it during which nothing else was computed; {} where it is not known.
        """
        elapsed_s, steps = time.perf_counter() - self._began, step - self._step
        split = {"step_s": elapsed_s / steps, "data_s": self._waited_s / steps, **communication}
        if communication:
            split["compute_s"] = max(
                0.0, split["step_s"] - split["data_s"] - communication["comm_exposed_s"])
        return {"images_per_s": batch_size * steps / elapsed_s, **split}


class Exchange:
    """How long exchanges of gradients take that nothing overlaps; a context manager around each.

    On a GPU a pair of events is recorded and read on the logging step, so that none waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._count, self._total_s, self._began = 0, 0.0, 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_PAIRS)

    def __enter__(self) -> None:
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._pairs.append((first, last))
            first.record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._pairs[-1][1].record()
        else:
            self._count += 1
            self._total_s += time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """comm_s and comm_exposed_s, which are equal: means since the last call, on a GPU of the
        last `_PAIRS` at most. Waits for the device."""
        for first, last in self._pairs:
            last.synchronize()
            self._count += 1
            self._total_s += first.elapsed_time(last) / 1e3
        mean_s = self._total_s / max(1, self._count)
        self._pairs.clear()
        self._count, self._total_s = 0, 0.0
        return {"comm_s": mean_s, "comm_exposed_s": mean_s}
