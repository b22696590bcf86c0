"""A writer killed at any moment: no unreadable state, no reported checkpoint lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from resnet_dist.run import checkpoint
from resnet_dist.run.checkpoint import CheckpointWriter
from resnet_dist.run.paths import RunPaths
from tests.unit.run.test_checkpoint import make_state, same_bits

NUMEL = 50_000


def write_until_killed(run: RunPaths, first: int, report: int) -> None:
    """Save step after step as a run does; write a step's number to `report` once it is saved."""
    checkpoint.clean(run)
    writer = CheckpointWriter(run, keep_last=2)
    for step in range(first, first + 10_000):
        writer.save(step, make_state(step, NUMEL), {"step": step})
        for saved in writer.wait():
            assert saved.error is None, saved
            os.write(report, saved.step.to_bytes(8, "little"))


def kill_often(root: Path, kills: int, seed: int) -> tuple[int, int]:
    """SIGKILL `kills` writers at random moments, check after each; (last step, mid-write kills).

    The time they have follows what the machine needs for a checkpoint now.
    """
    run, draw, longest_s = RunPaths(root), random.Random(seed), 0.03
    reported, torn = 0, 0
    for _ in range(kills):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(run, reported + 1, send)
            finally:
                os._exit(1)
        os.close(send)
        time.sleep(draw.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer failed before it was killed"
        heard = b""
        while part := os.read(receive, 1 << 16):
            heard += part
        os.close(receive)
        longest_s = max(0.02, longest_s * (0.8 if heard else 1.3))
        if heard:
            reported = int.from_bytes(heard[-8:], "little")
        for paths in run.checkpoints_on_disk():
            checkpoint.verify(paths)  # every one, not only the newest
        found = checkpoint.newest_valid(run)
        if reported:
            assert found is not None, "a reported checkpoint is gone"
            assert found[0].step >= reported
            step = found[0].step
            assert same_bits(checkpoint.load(found[0])[0], make_state(step, NUMEL))
            reported = step
        torn += any(run.checkpoints.glob(".tmp*"))
    return reported, torn


def test_thirty_kills_while_writing_lose_nothing(tmp_path: Path) -> None:
    reported, torn = kill_often(tmp_path / "run", 30, seed=0)
    assert reported > 0
    assert torn > 0, "no kill hit a write; the test proves nothing"


@pytest.mark.slow
def test_a_thousand_kills_while_writing_lose_nothing(tmp_path: Path) -> None:
    reported, torn = kill_often(tmp_path / "run", 1000, seed=1)
    assert torn > 300, f"only {torn} kills hit a write"
    assert reported > 300
