"""`profile=START:STOP`: a few steps of rank 0 under torch's profiler, written where people look.

Out: a Chrome trace in RUN/tensorboard (chrome://tracing, Perfetto, or TensorBoard with the
torch-tb-profiler plugin), and the dearest operations as a text in TensorBoard.
"""

from __future__ import annotations

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from resnet_dist.engine.clock import Clock
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import Metrics

log = logging.getLogger(__name__)

_ROWS = 25


class Trace:
    """The traced steps of one attempt.

    Args:
        steps: `config.profile`; None: nothing is traced.
        first: completed steps when the attempt began; a range that is over by then is left out.
    """

    def __init__(self, steps: str | None, run: RunPaths, metrics: Metrics, first: int,
                 device: torch.device) -> None:
        self._run, self._metrics = run, metrics
        self._start, self._stop = map(int, (steps or "0:0").split(":"))
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._running: profile | None = None
        if steps and first >= self._stop:
            log.warning("profile = %s: nothing to trace, this attempt begins at step %d", steps,
                        first)

    def before(self, step: int, clock: Clock) -> None:
        """Call before every step; `step` are completed. Writing a trace is no time of a step's."""
        if self._running is None and self._start <= step < self._stop:
            log.info("profiling steps %d to %d", step, self._stop)
            self._start = step
            self._running = profile(activities=self._activities)
            self._running.start()
        elif self._running is not None and step >= self._stop:
            with clock.paused():
                self.close(step)

    def close(self, step: int) -> None:
        """Write what was traced up to `step`."""
        if self._running is None:
            return
        self._running.stop()
        path = self._run.trace(self._start, step)
        path.parent.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(path))
        order = ("self_cuda_time_total" if ProfilerActivity.CUDA in self._activities
                 else "self_cpu_time_total")
        table = self._running.key_averages().table(sort_by=order, row_limit=_ROWS,
                                                   max_name_column_width=40)
        self._metrics.text("profile", f"steps {self._start} to {step}, {path.name}\n\n"
                           + indented(table), step)
        log.info("profile of steps %d to %d is in %s", self._start, step, path)
        self._running = None


def indented(text: str) -> str:
    """As a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
