"""Every file name in the system. Imports no torch; touches the disk only where a name says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointPaths:
    """One checkpoint: tensor files plus the commit record, which is written last."""

    root: Path

    @property
    def model(self) -> Path:
        """Weights and BatchNorm statistics averaged over ranks; what `eval` and `export` read."""
        return self.root / "model.safetensors"

    @property
    def optimizer(self) -> Path:
        return self.root / "optimizer.safetensors"

    @property
    def ranks(self) -> Path:
        """State that differs between ranks, stacked over ranks; needed for bit-exact resume."""
        return self.root / "ranks.safetensors"

    @property
    def state(self) -> Path:
        """Commit record: step, cursor, world, and SHA-256 of every other file."""
        return self.root / "state.json"

    @property
    def step(self) -> int:
        match = _STEP_NAME.fullmatch(self.root.name)
        assert match, self.root
        return int(match[1])


@dataclass(frozen=True)
class RunPaths:
    """One run directory, `runs/NAME`."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def code(self) -> Path:
        """The product's modules as they were when the run was submitted; its jobs run these."""
        return self.root / "code"

    @property
    def jobs(self) -> Path:
        """What happened to the run's jobs, one JSON object a line, append only."""
        return self.root / "jobs.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def trace(self, start: int, stop: int) -> Path:
        """Chrome trace of rank 0 over these steps; TensorBoard's profiler plugin wants this end."""
        return self.tensorboard / f"rank_0000.steps_{start}_{stop}.pt.trace.json.gz"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:04d}.log"

    @property
    def submitit(self) -> Path:
        """Pickles of the launcher; 0700, read by nobody but the owner."""
        return self.root / "submitit"

    @property
    def secret(self) -> Path:
        """Key of the supervisors' control channel, 0600."""
        return self.root / "submitit" / "secret"

    @property
    def stop_request(self) -> Path:
        """Its existence asks the running job to save and end for good."""
        return self.root / "stop_request"

    @property
    def lease(self) -> Path:
        """Locked by the one supervisor that runs this run; names it."""
        return self.root / "lease"

    @property
    def commit_lock(self) -> Path:
        """Held while a checkpoint is committed, and while the lease changes hands."""
        return self.root / "commit_lock"

    @property
    def rollbacks(self) -> Path:
        """Where the run went back because it had diverged."""
        return self.root / "rollbacks.json"

    @property
    def heartbeats(self) -> Path:
        """One file a rank; its modification time is the rank's last completed step."""
        return self.root / "heartbeats"

    def heartbeat(self, rank: int) -> Path:
        return self.heartbeats / f"rank_{rank:04d}"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> CheckpointPaths:
        return CheckpointPaths(self.checkpoints / f"step_{step:08d}")

    def checkpoints_on_disk(self) -> list[CheckpointPaths]:
        """Directories with a checkpoint's name, newest step first; verifies none."""
        if not self.checkpoints.is_dir():
            return []
        found = [CheckpointPaths(entry) for entry in self.checkpoints.iterdir()
                 if _STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
        return sorted(found, key=lambda paths: paths.step, reverse=True)

    @property
    def evaluations(self) -> Path:
        return self.root / "eval"


@dataclass(frozen=True)
class DatasetPaths:
    """One data set directory."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Written last: a directory without it is not a data set."""
        return self.root / "dataset.json"

    @property
    def rejected(self) -> Path:
        return self.root / "rejected.jsonl"

    @property
    def pixel_mean(self) -> Path:
        """float32 [H, W, 3] in [0, 255], where all images have one small size."""
        return self.root / "pixel_mean.npy"

    def shard(self, split: str, index: int) -> Path:
        return self.root / split / f"shard-{index:05d}.beton"
