"""Curves on disk: TensorBoard events and `metrics.jsonl`, written by rank 0 alone.

In: numbers of a step. Out: every step once, whatever was killed. A checkpoint at step s is
committed only after `flush()` put all lines up to s on disk, and a resume at s drops all that is
later; so no step can be missing before s or appear twice after it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from resnet_dist.paths import RunPaths

# TensorBoard groups curves by what stands before the slash.
_TAGS = {
    "train": {"loss": "train/loss", "top1": "train/top1", "top5": "train/top5",
              "lr": "train/lr", "images_per_s": "speed/images_per_s", "step_s": "speed/step_s",
              "data_s": "speed/data_s"},
    "val": {f"{weights}{key}": f"val/{weights}{key}" for weights in ("", "ema_")
            for key in ("loss", "top1", "top5")},
}


class Metrics:
    """Writer of one run's curves.

    Args:
        run: the run directory.
        step: steps completed so far; lines of later steps are dropped from the JSONL file, and
            TensorBoard is told to forget them (`purge_step`).
    """

    def __init__(self, run: RunPaths, step: int) -> None:
        _drop_after(run.metrics, step)
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        self._lines = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1, flush_secs=10)
        self._tensorboard = run.tensorboard

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`. `kind` is "train" or "val"."""
        line = {"step": step, "kind": kind, "time": time.time(), **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for key, value in values.items():
            if key in _TAGS[kind]:
                self._board.add_scalar(_TAGS[kind][key], value, step)

    def event(self, step: int, text: str) -> None:
        """Mark a checkpoint, restart or the like on the step axis."""
        self._board.add_text("events", text, step)

    def text(self, tag: str, text: str) -> None:
        self._board.add_text(tag, text, 0)

    def flush(self) -> None:
        """Put all that was written on disk. Called before a checkpoint is committed."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()
        for events in self._tensorboard.glob("events.*"):
            with open(events, "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()
        self._lines.close()
        self._board.close()


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, oldest first; a torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1]:
        line = json.loads(raw)
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without torn lines and lines past `step`, atomically."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
