"""Forward and backward as one CUDA graph: a rank's whole share is launched at once.

At 32 images a GPU, ResNet-50's 500 kernels of some 8 us each leave the host no time to launch them
one by one. The first steps run as always, on a stream of their own, and count as steps; then the
same work is recorded once, and every later step copies its inputs to where the recording reads and
replays it. A step is the same kernels on the same numbers either way.

What the host decides stays outside: the learning rate, the optimizer and the running statistics.
Collectives stay outside, too: the gradients of a replay are summed over ranks in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

WARM_STEPS = 3  # libraries choose their algorithms and allocate their scratch in the first ones


class Recorder(Protocol):
    """What records and replays; on GPUs `CudaRecorder`."""

    def warm(self, work: Callable[[], None]) -> None:
        """Run `work` once, as it will be recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which does not run; what replays it."""


class CudaRecorder:
    """Warms up and captures on one side stream, as capturing asks for."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def warm(self, work: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # "global", the default, would break off where a loader thread pins memory meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class RecordedStep:
    """`work(*inputs)`, recorded after `WARM_STEPS` calls with inputs of one shape.

    `work` reads nothing on the host, does the same kernels whatever the inputs hold, and leaves its
    results in tensors that stay where they are. An input may be None, if it always is.

    One shape at a time: another shape (progressive resizing) starts anew.
    """

    def __init__(self, work: Callable[..., None], recorder: Recorder) -> None:
        self._work, self._recorder = work, recorder
        self._shape: tuple[object, ...] | None = None
        self._calls = 0
        self._inputs: list[Tensor | None] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None) -> None:
        shape = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
        if shape != self._shape:
            self._shape, self._calls, self._replay = shape, 0, None
        self._calls += 1
        if self._calls <= WARM_STEPS:
            self._recorder.warm(lambda: self._work(*inputs))
            return
        if self._replay is None:
            self._inputs = [None if t is None else t.clone() for t in inputs]
            self._replay = self._recorder.record(lambda: self._work(*self._inputs))
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        self._replay()
