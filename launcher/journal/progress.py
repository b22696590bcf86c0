"""How far a run has come, from its files; no checkpoint is read beyond its name."""

from __future__ import annotations

from resnet_dist.run.paths import CheckpointPaths, RunPaths


def checkpoint_steps(run: RunPaths) -> list[int]:
    """Steps of the checkpoints with a commit record, newest first."""
    return [paths.step for paths in run.checkpoints_on_disk() if paths.state.exists()]


def newest_checkpoint(run: RunPaths) -> CheckpointPaths | None:
    """The newest one with a commit record; whether its bytes are whole, the workers verify."""
    return next((paths for paths in run.checkpoints_on_disk() if paths.state.exists()), None)


def checkpoint_step(run: RunPaths) -> int:
    """Step of the newest checkpoint, 0 without one."""
    newest = newest_checkpoint(run)
    return newest.step if newest else 0


def heartbeat_steps(run: RunPaths, attempt: int) -> list[int]:
    """Steps that the ranks of an attempt reported last."""
    steps = []
    for path in run.heartbeats.glob("rank_*"):
        try:
            number, step = path.read_text().split()
            if int(number) == attempt:
                steps.append(int(step))
        except (OSError, ValueError):
            continue  # just being replaced, or not a heartbeat
    return steps


def reached(run: RunPaths, attempt: int) -> int:
    """The furthest step that a rank reported in this attempt, 0 when none did."""
    return max(heartbeat_steps(run, attempt), default=0)
