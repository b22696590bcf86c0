"""Runs of the stand-in worker on the local SLURM: submitted as the product does, then watched."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.journal.events import Event, read_events, record, redone_steps
from launcher.journal.progress import heartbeat_steps
from launcher.submission.submit import prepare, queue
from resnet_dist.run.paths import RunPaths
from tests.conftest import ROOT
from tests.unit.launcher import stand_in


class SlurmRun:
    """One submitted run."""

    def __init__(self, root: Path, **settings: object) -> None:
        settings.setdefault("cpus_per_rank", 1)
        settings.setdefault("steps", 400)
        self.run, config = stand_in.make_run(root, **settings)  # type: ignore[arg-type]
        prepare(self.run)
        record(self.run, "submitted", where="slurm", nodes=config.launch.nodes,
               steps=config.steps, batch_size=config.batch_size)
        os.environ["PYTHONPATH"] = str(ROOT)  # where the job's class is
        self.job = queue(config, self.run, stand_in.StandInJob(str(root)))
        record(self.run, "queued", job=self.job)

    @classmethod
    def of(cls, run: RunPaths, job: str) -> SlurmRun:
        """A run that was queued already."""
        made = cls.__new__(cls)
        made.run, made.job = run, job
        return made

    def events(self, kind: str | None = None) -> list[Event]:
        return [e for e in read_events(self.run) if kind is None or e["event"] == kind]

    def wait(self, condition: Callable[[], object], limit_s: float = 120) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, (self.events(), self.said(), slurm("squeue"))
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until a rank of the newest attempt has made it."""
        self.wait(lambda: self.events("attempt") and max(heartbeat_steps(
            self.run, self.events("attempt")[-1]["attempt"]), default=0) >= step)

    def wait_until_over(self, limit_s: float = 180) -> None:
        self.wait(lambda: self.events()[-1]["event"] in ("finished", "failed", "stopped"), limit_s)

    def states(self) -> list[str]:
        """States of all incarnations in the accounting, once the last one is final."""
        deadline = time.monotonic() + 60
        while True:
            states = [line.split()[0] for line in slurm(
                "sacct", "-n", "-X", "-D", "-P", "-j", self.job, "-o", "State").splitlines()]
            if states and states[-1] not in ("RUNNING", "PENDING", "COMPLETING"):
                return states
            assert time.monotonic() < deadline, states
            time.sleep(0.2)

    @property
    def redone(self) -> int:
        return redone_steps(self.events())

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.run.submitit.glob("*.err"))


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
