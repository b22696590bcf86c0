"""What follows a divergence: a checkpoint further back each time, and an end to that."""

from __future__ import annotations

import re

from launcher.journal.events import record, rollbacks_in_a_row
from launcher.journal.progress import reached
from launcher.supervise.attempt import Attempt
from launcher.supervise.folder import Folder
from launcher.supervise.incarnation import note_crash
from resnet_dist.config.schema import DivergenceConfig
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import Rollback, add_rollback


def go_back(run: RunPaths, folder: Folder, attempt: Attempt, limits: DivergenceConfig) -> str:
    """Prepare the attempt after a divergence; why the run must give up, or ""."""
    events, steps = folder.events(), folder.steps()
    newest = steps[0] if steps else 0
    said = re.search(r"step (\d+):", attempt.cause)
    step = int(said[1]) if said else reached(run, attempt.number)
    note_crash(run, attempt.number, attempt.cause, 0, diverged_at=step)
    tried = rollbacks_in_a_row(events, newest)
    if len(tried) >= limits.max_rollbacks:
        where = ", ".join(str(each["to"]) for each in tried)
        eased = f" with the learning rate times {limits.lr_factor}" if limits.lr_factor < 1 \
            else " on the same course"
        back = f"; tried again from step {where}{eased}" if tried else ""
        return (f"{attempt.cause}{back}. The run diverges by itself: resume with "
                "divergence.lr_factor=0.5, or start another with a lower optimizer.lr, more "
                "schedule.warmup_steps or optimizer.clip_norm")
    # One checkpoint further back each time: the newest may already carry what went wrong.
    to = steps[min(len(tried), len(steps) - 1)] if steps else 0
    until = step + limits.lr_steps if limits.lr_factor < 1 else 0
    add_rollback(run, Rollback(step, to, limits.lr_factor, until))
    record(run, "rolled_back", attempt=attempt.number, diverged_at=step, to=to,
           checkpoint=newest, lr_factor=limits.lr_factor, until=until)
    return ""
