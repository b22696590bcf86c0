"""Curves on disk: TensorBoard events and `metrics.jsonl`, written by rank 0 alone.

In: numbers of a step, pictures now and then. Out: every step once, whatever was killed. A
checkpoint at step s is committed only after `flush()` put all lines up to s on disk, and a resume
at s drops all that is later; so no step can be missing before s or appear twice after it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as session_summaries

from resnet_dist.run.curves import drop_lines_after, read_lines
from resnet_dist.run.event_files import drop_after, put_before_now
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

# TensorBoard groups curves by what stands before the slash.
_TAGS = {
    "train": {"loss": "train/loss", "top1": "train/top1", "top5": "train/top5",
              "lr": "train/lr", "gradient_norm": "norm/gradient",
              "parameter_norm": "norm/parameters", "images_per_s": "speed/images_per_s",
              "step_s": "speed/step_s", "data_s": "speed/data_s", "compute_s": "speed/compute_s",
              "comm_s": "speed/communication_s", "comm_exposed_s": "speed/communication_exposed_s",
              "host_memory_gb": "device/host_memory_gb", "gpu_percent": "device/gpu_percent",
              "gpu_memory_gb": "device/gpu_memory_gb",
              "gpu_memory_peak_gb": "device/gpu_memory_peak_gb",
              "gpu_memory_reserved_gb": "device/gpu_memory_reserved_gb"},
    "val": {f"{weights}{key}": f"val/{weights}{key}" for weights in ("", "ema_")
            for key in ("loss", "top1", "top5")},
}
_EVENTS_SHOWN = 50

P = ParamSpec("P")


def best_effort(write: Callable[P, None]) -> Callable[P, None]:
    """A full disk costs curves, and not the run: what cannot be written alarms."""
    @wraps(write)
    def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            write(*args, **kwargs)
        except OSError as error:
            log.error("ALARM: curves not written: %s", error)
    return tried


class Metrics:
    """Writer of one run's curves.

    Args:
        run: the run directory.
        step: steps completed so far; whatever is later goes from metrics.jsonl and from
            TensorBoard's files, and a TensorBoard that is open is told to forget it (`purge_step`).
    """

    def __init__(self, run: RunPaths, step: int) -> None:
        drop_lines_after(run.metrics, step)
        drop_after(run.tensorboard, step)
        put_before_now(run.tensorboard)
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        self._events = read_lines(run.metrics, "event")
        self._lines = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1, flush_secs=10)
        self._tensorboard = run.tensorboard

    @best_effort
    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`. `kind` is "train" or "val"."""
        self._line(kind, step, values)
        for key, value in values.items():
            if key in _TAGS[kind]:
                self._board.add_scalar(_TAGS[kind][key], value, step)

    @best_effort
    def mark(self, what: str, step: int, text: str, value: float | None = None) -> None:
        """Mark a start, checkpoint or the like on the step axis, and in the table of events.

        Args:
            what: "start", "checkpoint", "alarm"; the curve `events/WHAT` gets a point.
            value: its height; None: how many of `what` there have been.
        """
        if value is None:
            value = 1 + sum(event["what"] == what for event in self._events)
        self._events.append(self._line("event", step, {"what": what, "text": text, "value": value}))
        self._board.add_scalar(f"events/{what}", value, step)
        self._board.add_text("events", event_table(self._events), step)

    @best_effort
    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._board.add_text(tag, text, step)

    @best_effort
    def picture(self, tag: str, step: int, picture: Image.Image) -> None:
        """As JPEG: photographs as PNG would be ten times the size, and TensorBoard's writer
        checksums every byte in Python (0.1 s a megabyte)."""
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
        image = Summary.Image(height=picture.height, width=picture.width, colorspace=3,
                              encoded_image_string=buffer.getvalue())
        self._add([Summary.Value(tag=tag, image=image)], step)

    @best_effort
    def figure(self, tag: str, step: int, figure: Any) -> None:
        """A matplotlib Figure."""
        self._board.add_figure(tag, figure, step)

    @best_effort
    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """Of the finite ones of `values`, any shape."""
        finite = values[np.isfinite(values)]
        if finite.size:
            self._board.add_histogram(tag, finite, step)

    @best_effort
    def scalar(self, tag: str, step: int, value: float) -> None:
        """A curve of TensorBoard alone."""
        self._board.add_scalar(tag, value, step)

    @best_effort
    def hparams(self, values: dict[str, bool | int | float | str]) -> None:
        """What this run is set to, for TensorBoard's table of runs.

        The table takes its columns from all runs it sees: an experiment summary of this run's own
        would hide the settings that only other runs of a sweep have.
        """
        _, session, _ = session_summaries(values, {})
        self._add(session.value, 0)

    @best_effort
    def flush(self) -> None:
        """Put all that was written on disk. Called before a checkpoint is committed."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()
        for events in self._tensorboard.glob("events.*"):
            with open(events, "rb") as file:
                os.fsync(file.fileno())

    @best_effort
    def close(self) -> None:
        self.flush()
        self._lines.close()
        self._board.close()

    def _line(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        line = {"step": step, "kind": kind, "time": time.time(), **values}
        self._lines.write(json.dumps(line) + "\n")
        try:
            self._lines.flush()
        except OSError as error:  # kept in memory, and written with a later one
            log.error("ALARM: %s not written: %s", self._lines.name, error)
        return line

    def _add(self, values: Any, step: int) -> None:
        writer = self._board.file_writer
        assert writer is not None, "the board is open"
        writer.add_summary(Summary(value=values), step)


def event_table(events: list[dict[str, Any]]) -> str:
    """Markdown, newest first. One table and not a text an event: TensorBoard shows a few texts of a
    tag, and of two at one step only the later."""
    rows = [f"| {event['step']:,} | {_moment(event['time'])} | {event['what']} "
            f"| {event['text'].replace('|', '/')} |" for event in reversed(events[-_EVENTS_SHOWN:])]
    return "\n".join(["| step | time | event | |", "|---|---|---|---|", *rows])


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
