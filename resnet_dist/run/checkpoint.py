"""Checkpoints: written aside, committed by one rename, verified byte by byte before use.

In: an `EngineState` on the host and what else a resume needs, as plain data. Out: a directory
`checkpoints/step_N` of safetensors files and `state.json`, the commit record with every file's
SHA-256. Independent of world size and engine; no pickle anywhere.

The crash argument. All files are written to `.tmp-step_N-PID`, each fsynced; `state.json` comes
last; the directory is fsynced, renamed to `step_N`, and the parent fsynced. So a directory named
`step_N` is complete on disk, and whatever a kill leaves behind has another name, which no reader
looks at and the next start removes. A checkpoint counts as saved only once it has been reported,
after the last fsync. Old ones are renamed to `.trash-...` before they are deleted, for the same
reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from resnet_dist.run.atomic import sync_directory, write_durably
from resnet_dist.run.file_errors import passes, waited_out
from resnet_dist.run.paths import CheckpointPaths, RunPaths
from resnet_dist.run.rollback import Rollback, given_up

log = logging.getLogger(__name__)

FORMAT = 1
Fence = Callable[[], AbstractContextManager[None]]
_PARTS = ("model", "optimizer", "ranks")


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted; the message names file and reason."""


@dataclass(frozen=True)
class EngineState:
    """What a later step depends on, on the CPU.

    `model` (weights, BatchNorm statistics averaged over ranks) and `optimizer`
    (`momentum_buffer/NAME` ...) do not depend on the world size. `ranks` does: one row per rank,
    for bit-exact resume.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ranks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What became of one save. `error` is None when the checkpoint is on disk, committed."""

    step: int
    seconds: float
    size_bytes: int
    error: str | None = None


# -- Writing ---------------------------------------------------------------------------------------

class CheckpointWriter:
    """Writes checkpoints in the background; rank 0 alone has one.

    Args:
        keep_last: how many of the newest checkpoints stay.
        keep_every_steps: those at multiples of this stay too, for good; None: none do.
        fence: entered for the commit; it raises to refuse it, e.g. because another job owns the run
            by now.
    """

    def __init__(self, run: RunPaths, keep_last: int, fence: Fence = nullcontext,
                 keep_every_steps: int | None = None) -> None:
        self._run, self._fence = run, fence
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self.best_step: int | None = None  # the loop sets it: this checkpoint stays too
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._results: list[Saved] = []
        self.last: Saved | None = None  # what became of the newest save that has ended

    def save(self, step: int, state: EngineState, meta: dict[str, Any]) -> None:
        """Start writing; returns once the previous write has ended.

        `state` must not change afterwards (`engine.state()` returns copies). A failure is logged
        and reported by `finished()`; older checkpoints stay as they are and training may go on.
        """
        self._hurry.set()  # a write that waits for the disk has had its time: training goes on
        self._join()
        self._hurry.clear()
        json.dumps(meta)  # plain data or a TypeError here, in the caller, not in the thread
        self._thread = threading.Thread(target=self._write, args=(step, state, meta),
                                        name=f"checkpoint-{step}")
        self._thread.start()

    def finished(self) -> list[Saved]:
        """What has ended since the last call; never waits. Only here is a save reported."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        done, self._results = self._results, []
        return done

    def wait(self) -> list[Saved]:
        """Wait for the write that is under way; then as `finished`."""
        self._join()
        return self.finished()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: EngineState, meta: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            size = waited_out(partial(write, self._run, step, state, meta, self._fence),
                              hurry=self._hurry)
        except Exception as error:  # alarm, keep the old ones, let training go on
            log.error("checkpoint of step %d NOT saved: %s: %s; older checkpoints are intact",
                      step, type(error).__name__, error)
            self.last = Saved(step, time.monotonic() - started, 0,
                              f"{type(error).__name__}: {error}")
            self._results.append(self.last)
            return
        self.last = Saved(step, time.monotonic() - started, size)
        self._results.append(self.last)
        try:
            retain(self._run, self._keep_last, self._keep_every_steps, self.best_step)
        except OSError as error:
            log.warning("old checkpoints not removed: %s", error)


def write(run: RunPaths, step: int, state: EngineState, meta: dict[str, Any],
          fence: Fence = nullcontext) -> int:
    """Write and commit one checkpoint, in the calling thread; its size in bytes.

    Raises: OSError where the disk fails; nothing with a checkpoint's name has changed then.
    """
    final = run.checkpoint(step)
    aside = CheckpointPaths(run.checkpoints / f".tmp-{final.root.name}-{os.getpid()}")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside.root, ignore_errors=True)
    aside.root.mkdir()
    try:
        files, size = {}, 0
        for part in _PARTS:
            content = safetensors.torch.save(getattr(state, part))
            path: Path = getattr(aside, part)
            write_durably(path, content)
            digest = hashlib.sha256(content).hexdigest()
            files[path.name] = {"bytes": len(content), "sha256": digest}
            size += len(content)
            del content
        record: dict[str, Any] = {"format": FORMAT, "step": step, "files": files, "meta": meta}
        record["sha256"] = _record_hash(record)
        write_durably(aside.state, json.dumps(record, indent=1).encode())
        sync_directory(aside.root)
        with fence():
            if final.root.exists():
                # Same step again, e.g. after rolling back past it. Two renames; `clean` puts the
                # old one back if a kill falls between them.
                os.rename(final.root, run.checkpoints / f".old-{final.root.name}")
            os.rename(aside.root, final.root)
            sync_directory(run.checkpoints)
    except BaseException:
        shutil.rmtree(aside.root, ignore_errors=True)
        raise
    shutil.rmtree(run.checkpoints / f".old-{final.root.name}", ignore_errors=True)
    return size


def retain(run: RunPaths, keep_last: int, keep_every_steps: int | None = None,
           best_step: int | None = None) -> None:
    """Delete all but the newest checkpoints, every so many steps' and the best."""
    for paths in run.checkpoints_on_disk()[keep_last:]:
        kept = keep_every_steps is not None and paths.step % keep_every_steps == 0
        if not kept and paths.step != best_step:
            _discard(run, paths)


def discard_given_up(run: RunPaths, rollbacks: Sequence[Rollback]) -> None:
    """Delete checkpoints of a course that was given up, once there is a valid one to go on from."""
    for paths in run.checkpoints_on_disk():
        if _given_up(paths, rollbacks):
            log.info("removing %s: the run went back beyond it", paths.root)
            _discard(run, paths)


def _given_up(paths: CheckpointPaths, rollbacks: Sequence[Rollback]) -> bool:
    """False for one whose record cannot be read: `newest_valid` names it."""
    try:
        known = int(read_record(paths)["meta"].get("rollbacks", 0))
    except CheckpointError:
        return False
    return given_up(rollbacks, paths.step, known)


def clean(run: RunPaths) -> None:
    """Remove what killed writers left behind. Rank 0 alone, before anything is written."""
    if not run.checkpoints.is_dir():
        return
    for entry in sorted(run.checkpoints.iterdir()):
        if entry.name.startswith(".old-"):
            replaced = run.checkpoints / entry.name.removeprefix(".old-")
            if not replaced.exists():
                os.rename(entry, replaced)
                continue
        if entry.name.startswith((".tmp-", ".trash-", ".old-")):
            log.info("removing %s, left by a killed writer", entry)
            shutil.rmtree(entry)


def _discard(run: RunPaths, paths: CheckpointPaths) -> None:
    trash = run.checkpoints / f".trash-{paths.root.name}-{os.getpid()}"
    os.rename(paths.root, trash)
    shutil.rmtree(trash)


def _record_hash(record: dict[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- Reading ---------------------------------------------------------------------------------------

def newest_valid(run: RunPaths, rollbacks: Sequence[Rollback] = ()
                 ) -> tuple[CheckpointPaths, dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as written, with its record; None without any.

    Damaged ones are skipped and named in the log; those that `rollbacks` gave up do not count.
    Raises: CheckpointError where there are checkpoints and none is valid: starting again at step 0
    would throw the run away.
    """
    damaged, trouble = [], None
    for paths in run.checkpoints_on_disk():
        if _given_up(paths, rollbacks):
            continue
        try:
            return paths, waited_out(partial(verify, paths))
        except CheckpointError as error:
            trouble = trouble or (error if passes(error) else None)
            log.error("skipping a damaged checkpoint: %s", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            f"no valid checkpoint among {len(damaged)}, and the run is not started over:\n"
            + "\n".join(damaged)
            + f"\nrestore one, or move {run.checkpoints} away to start at step 0") from trouble
    return None


def verify(paths: CheckpointPaths) -> dict[str, Any]:
    """The commit record of a checkpoint whose every file has the recorded size and SHA-256.

    Raises: CheckpointError naming the first file that is not as written.
    """
    record = read_record(paths)
    for part in _PARTS:
        _read_checked(getattr(paths, part), record)
    return record


def load(paths: CheckpointPaths) -> tuple[EngineState, dict[str, Any]]:
    """State and meta. Tensors come from the very bytes that were hashed.

    Raises: CheckpointError as `verify`.
    """
    record = read_record(paths)
    parts = {}
    for part in _PARTS:
        path: Path = getattr(paths, part)
        try:
            parts[part] = safetensors.torch.load(_read_checked(path, record))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return EngineState(**parts), record["meta"]


def load_model(paths: CheckpointPaths, *,
               ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's state dict alone, and meta: for evaluation and export.

    ema: the averaged weights. Raises: CheckpointError as `verify`, and where there are none.
    """
    record = read_record(paths)
    path = paths.optimizer if ema else paths.model
    try:
        tensors = safetensors.torch.load(_read_checked(path, record))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if ema:
        tensors = {name[4:]: value for name, value in tensors.items() if name[:4] == "ema/"}
        if not tensors:
            raise CheckpointError(f"{path}: holds no averaged weights (ema.decay = null)")
    return tensors, record["meta"]


def read_record(paths: CheckpointPaths) -> dict[str, Any]:
    """The commit record, checked against itself. Raises: CheckpointError."""
    try:
        record = json.loads(paths.state.read_bytes())
        whole = record["sha256"] == _record_hash(record)
    except FileNotFoundError as error:
        raise CheckpointError(f"{paths.state}: missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{paths.state}: unreadable ({error})") from error
    if not whole:
        raise CheckpointError(f"{paths.state}: does not match its own SHA-256")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{paths.state}: format {record['format']}; "
                              f"this version reads {FORMAT}")
    if record["step"] != paths.step:
        raise CheckpointError(f"{paths.state}: is of step {record['step']}")
    return dict(record)


def _read_checked(path: Path, record: dict[str, Any]) -> bytes:
    expected = record["files"][path.name]
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, {expected['bytes']} were written")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path}: its content does not match the recorded SHA-256")
    return content
