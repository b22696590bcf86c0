"""Going back from a divergence: which checkpoints no longer count, and an eased learning rate.

`rollbacks.json` in the run directory lists every rollback, oldest first; the leading supervisor
adds to it before it starts the next attempt, and every rank reads it. A checkpoint records how many
rollbacks it knew, so that after any crash it is plain which ones lie on a course that was given
up. The learning rate is a pure function of this list and the step: a resume draws the same curve.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.run.atomic import write_atomically
from resnet_dist.run.paths import RunPaths


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier checkpoint."""

    diverged_at: int  # completed steps when something was no longer a number
    to: int  # later checkpoints than this one, made before the rollback, are given up
    lr_factor: float = 1.0  # of the learning rate ...
    until: int = 0  # ... in steps [to, until)


def read_rollbacks(run: RunPaths) -> tuple[Rollback, ...]:
    """All rollbacks of a run, oldest first; () without any."""
    try:
        text = run.rollbacks.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return tuple(Rollback(**each) for each in json.loads(text))


def add_rollback(run: RunPaths, rollback: Rollback) -> None:
    """Append, atomically and durably: the next attempt must not miss it."""
    known = [dataclasses.asdict(each) for each in (*read_rollbacks(run), rollback)]
    write_atomically(run.rollbacks, json.dumps(known, indent=1))


def given_up(rollbacks: Sequence[Rollback], step: int, known: int) -> bool:
    """Whether a checkpoint of `step`, made after `known` rollbacks, no longer counts."""
    return any(step > rollback.to for rollback in rollbacks[known:])


def eased(rollbacks: Sequence[Rollback], step: int) -> float:
    """What the learning rate of the step after `step` completed ones is multiplied with."""
    factor = 1.0
    for rollback in rollbacks:
        if rollback.to <= step < rollback.until:
            factor *= rollback.lr_factor
    return factor
