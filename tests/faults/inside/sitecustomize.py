"""Faults that can only be made inside a rank: imported by Python at its start, through PYTHONPATH.

FAULT is a list, separated by commas, of `kind:rank:step[:attempt[:value]]`: in that attempt (1
where none is given, `*` in every one) the rank (`*`: every one) does `kind` as it takes the step
after `step` completed ones. Every other process, and a rank without a fault, is left as it is.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def mine() -> list[tuple[str, int, float]]:
    """(kind, step, value) of this rank in this attempt."""
    found = []
    for text in filter(None, os.environ.get("FAULT", "").split(",")):
        words = text.split(":")
        kind, rank, step, attempt, value = words + ["1", "0"][len(words) - 3:]
        if rank in ("*", os.environ.get("RANK", "0")) and attempt in (
                "*", os.environ.get("RESNET_DIST_ATTEMPT", "1")):
            found.append((kind, int(step), float(value)))
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_step(act: Callable[[Any, int, float], float], at: Callable[[int], bool]) -> None:
    """`act(engine, steps, lr)` where `at(steps)`; the step is taken at the rate it returns."""
    from resnet_dist.engine.core import Engine

    plain = Engine.train_step

    def train_step(self: Any, images: Any, labels: Any, keys: Any, lr: float, mix: Any = None
                   ) -> None:
        plain(self, images, labels, keys, act(self, self.steps, lr) if at(self.steps) else lr, mix)

    Engine.train_step = train_step  # type: ignore[method-assign]


def kill(step: int, value: float) -> None:
    before_step(lambda engine, steps, lr: die() or lr, lambda steps: steps == step)


def nan(step: int, value: float) -> None:
    """A rate that is no number, as a flipped bit may make it."""
    before_step(lambda engine, steps, lr: float("nan"), lambda steps: steps == step)


def slow(step: int, value: float) -> None:
    """`value` seconds more for every step from `step` on; changes no bit."""
    before_step(lambda engine, steps, lr: time.sleep(value) or lr, lambda steps: steps >= step)


def hog(step: int, value: float) -> None:
    """Take memory until somebody objects."""
    def take(engine: Any, steps: int, lr: float) -> float:
        held = []
        while True:
            held.append(bytearray(b"x" * (64 << 20)))

    before_step(take, lambda steps: steps == step)


def eio(step: int, value: float) -> None:
    """fsync of the checkpoint of `step` fails, as on a dying disk."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if f".tmp-step_{step:08d}" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(handle)

    os.fsync = fsync


def loader(step: int, value: float) -> None:
    """A data thread raises what nobody foresaw, in its `step`-th piece of work."""
    from resnet_dist.data import engine as module

    plain, calls = module.compiled_stage, iter(range(1 << 30))

    def compiled_stage() -> Callable[..., None]:
        stage = plain()

        def work(*arguments: Any) -> None:
            if next(calls) == step:
                raise RuntimeError(f"a fault in a data thread at {time.time():.3f}")
            stage(*arguments)

        return work

    module.compiled_stage = compiled_stage


def clock(step: int, value: float) -> None:
    """The wall clock is `value` seconds off, in C as in Python; timers and file times stay true.

    The same process starts its program again, on top of libfaketime.
    """
    if "FAKETIME" in os.environ:
        return
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    os.execve(sys.executable, sys.orig_argv, {
        **os.environ, "LD_PRELOAD": str(library), "FAKETIME": f"{value:+.0f}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"})


def state(step: int, value: float) -> None:
    """SIGKILL while the ranks gather the state of `step` for a checkpoint."""
    from resnet_dist.engine.core import Engine

    plain = Engine.state

    def gather(self: Any) -> Any:
        if self.steps == step:
            die()
        return plain(self)

    Engine.state = gather  # type: ignore[method-assign]


def torn(step: int, value: float) -> None:
    """SIGKILL between the flush of the curves and the checkpoint of `step`, with half a line."""
    from resnet_dist.run.checkpoint import CheckpointWriter

    plain = CheckpointWriter.save

    def save(self: Any, at: int, state: Any, meta: Any) -> None:
        if at == step:
            with open(self._run.metrics, "a") as file:
                file.write('{"step": 31, "kind": "tra')
            die()
        plain(self, at, state, meta)

    CheckpointWriter.save = save  # type: ignore[method-assign]


def late(step: int, value: float) -> None:
    """SIGSTOP just before the checkpoint of `step` is written; whoever continues it decides when
    it is committed."""
    from resnet_dist.run.checkpoint import CheckpointWriter

    plain = CheckpointWriter.save

    def save(self: Any, at: int, state: Any, meta: Any) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        plain(self, at, state, meta)

    CheckpointWriter.save = save  # type: ignore[method-assign]


if "resnet_dist.train" in sys.orig_argv:
    for _kind, _step, _value in mine():
        globals()[_kind](_step, _value)
