"""What a run will cost, told before it is queued: iterations, hours, GPU-hours, disk.

The speed comes from the logs of earlier runs of the same network where there are any, else from
the figures below; the estimate says which.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal as size

from launcher.slurm.sbatch import gpus_per_node
from launcher.slurm.scheduler import ask
from launcher.watch.status import find_runs
from resnet_dist.config.load import config_to_dict
from resnet_dist.config.schema import Config
from resnet_dist.data.shards.manifest import Manifest
from resnet_dist.models.catalog.names import MODELS
from resnet_dist.models.catalog.sizes import SIZES
from resnet_dist.run.paths import RunPaths

# Giga multiply-adds a second of the forward pass while training; other networks by their
# multiply-adds. GPU: NVIDIA DeepLearningExamples, ResNet-50 on one A100 in mixed precision, 2,470
# images/s. CPU core: RESULTS.md of this project, ResNet-20 and ResNet-50 in bf16, rounded down.
A100_GMACS_PER_S = 2470 * SIZES["resnet50"][1]
CPU_CORE_GMACS_PER_S = 15.0
_RUNS_LOOKED_AT = 50  # newest first
_LINES_LOOKED_AT = 50  # of a run's log: the median of the last ones
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the quick one where it was built
_OPTIMIZER_COPIES = {"adamw": 2, "lamb": 2}  # tensors beside the weights; the others keep one


@dataclass(frozen=True)
class Estimate:
    """`source` says where `images_per_s`, of all ranks, comes from."""

    steps: int
    images: int
    epochs: float
    images_per_s: float
    source: str
    hours: float
    jobs: int  # of the time limit, in a row
    gpu_hours: float
    checkpoint_bytes: int  # one
    checkpoints: int  # on disk at once, at most
    free_bytes: int  # where the run will be
    note: str = ""  # what is possible and probably not meant

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.checkpoints

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "disk_bytes": self.disk_bytes}

    def rows(self, config: Config) -> list[tuple[str, str]]:
        """(what, how much) for a person."""
        launch = config.launch
        jobs = "" if self.jobs == 1 else (f"; {self.jobs} jobs of at most {launch.time_minutes} "
                                          "minutes, which follow each other by themselves")
        rows = [("iterations", f"{self.steps:,} of {config.batch_size:,} images: "
                               f"{self.epochs:.1f} epochs"),
                ("speed", f"{self.images_per_s:,.0f} images/s, {self.source}"),
                ("time", f"{_hours(self.hours)} on {launch.nodes} node"
                         f"{'s' * (launch.nodes > 1)} x {launch.ranks_per_node} ranks{jobs}")]
        if self.gpu_hours:
            rows.append(("GPU-hours", f"{self.gpu_hours:,.1f}"))
        rows += [("note", self.note)] if self.note else []
        return [*rows, ("checkpoints", f"{size(self.disk_bytes)}: {self.checkpoints} of "
                                       f"{size(self.checkpoint_bytes)}; {size(self.free_bytes)} "
                                       "free")]


def estimate(config: Config, manifest: Manifest | None) -> Estimate:
    """From files alone; no network is built. `manifest`: None where the data set is still made."""
    images = config.steps * config.batch_size
    samples = manifest.splits["train"].samples if manifest else 0
    rate, source = _measured(config) or _assumed(config)
    hours = images / rate / 3600
    return Estimate(
        steps=config.steps, images=images, epochs=images / samples if samples else 0.0,
        images_per_s=rate, source=source, hours=hours,
        jobs=max(1, -(-int(hours * 60) // config.launch.time_minutes)),
        gpu_hours=hours * gpus_per_node(config) * config.launch.nodes,
        checkpoint_bytes=checkpoint_bytes(config), checkpoints=checkpoints_kept(config),
        free_bytes=free_bytes(Path(config.runs)))


def disk_problems(config: Config, cost: Estimate, runs: int = 1) -> list[str]:
    """Why the checkpoints of so many runs do not fit where they go; empty where they do."""
    if cost.disk_bytes * runs <= cost.free_bytes:
        return []
    return [f"runs = {config.runs}: {cost.checkpoints * runs} checkpoints of "
            f"{size(cost.checkpoint_bytes)} need {size(cost.disk_bytes * runs)}, "
            f"{size(cost.free_bytes)} are left there; name another folder with runs=DIR, or keep "
            "fewer with checkpoint.keep_last=1"]


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint: weights, optimizer, average and BatchNorm rows, all float32."""
    copies = 2 + _OPTIMIZER_COPIES.get(config.optimizer.name, 1) - 1
    copies += config.ema.decay is not None
    return int(SIZES[config.model.name][0] * 1e6 * 4 * copies * 1.02) + 100_000


def checkpoints_kept(config: Config) -> int:
    """At most on disk at once: the last ones, one being written, and those that stay."""
    keep = config.checkpoint
    stay = config.steps // keep.keep_every_steps if keep.keep_every_steps else 0
    made = -(-config.steps // keep.every_steps)
    return min(made, keep.keep_last + 1 + stay + keep.keep_best)


def free_bytes(runs: Path) -> int:
    """What this user may still write where `runs` is, or will be made."""
    folder = runs.absolute()
    while not folder.is_dir():
        folder = folder.parent
    facts = os.statvfs(folder)
    left = [facts.f_bavail * facts.f_frsize]
    if shutil.which("quota"):
        left += _quota_left(_device(folder))
    return max(0, min(left))


def _device(folder: Path) -> str:
    """What is mounted where `folder` lies, as `quota` names it."""
    return (ask(["df", "--output=source", str(folder)], 10) or "?").split()[-1]


def _quota_left(device: str) -> list[int]:
    """Bytes that this user has left there, where a limit is set."""
    text = ask(["quota", "-w", "-p"], 10) or ""
    lines = re.findall(rf"^\s*{re.escape(device)}\s+(\d+)\*?\s+(\d+)\*?\s+(\d+)", text, re.M)
    return [((int(hard) or int(soft)) - int(used)) * 1024 for used, soft, hard in lines
            if int(hard) or int(soft)]


def _measured(config: Config) -> tuple[float, str] | None:
    """From the newest earlier run that computed the same on the same kind of rank."""
    logs = [run for run in find_runs(Path(config.runs)) if run.metrics.is_file()]
    logs.sort(key=lambda run: run.metrics.stat().st_mtime, reverse=True)
    wanted = _kind(config_to_dict(config))
    for run in logs[:_RUNS_LOOKED_AT]:
        try:
            tree = yaml.load(run.config.read_text(encoding="utf-8"), Loader=_LOADER)
            kind, launch = _kind(tree), tree["launch"]
        except (OSError, KeyError, TypeError, yaml.YAMLError):
            continue  # not a run directory of this version
        rates = _rates(run)
        if kind == wanted and rates:
            ranks = launch["nodes"] * launch["ranks_per_node"]
            rate = statistics.median(rates) / ranks
            return rate * config.world, (f"as run {run.name} had on {ranks} rank"
                                         f"{'s' * (ranks > 1)}"
                                         + ("" if ranks == config.world else ", a rank alike"))
    return None


def _assumed(config: Config) -> tuple[float, str]:
    entry = MODELS[config.model.name]
    gmacs = SIZES[config.model.name][1] * (config.augment.size / entry.input_size) ** 2
    if gpus_per_node(config):
        return (A100_GMACS_PER_S / gmacs * config.world,
                "assumed: an A100's 2,470 with ResNet-50 (NVIDIA), by multiply-adds")
    ranks = config.launch.ranks_per_node
    cores = config.launch.cpus_per_rank or max(1, (os.cpu_count() or 1) // ranks)
    return (CPU_CORE_GMACS_PER_S * cores / gmacs * config.world,
            f"assumed: {CPU_CORE_GMACS_PER_S:.0f} giga multiply-adds a second and CPU core, "
            f"{cores} core{'s' * (cores > 1)} a rank")


def _kind(tree: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the speed of a rank."""
    launch = tree["launch"]
    return (tree["model"], tree["augment"]["size"], tree["augment"]["sizes"], tree["precision"],
            tree["device"], tree["mode"], tree["engine"], launch["gpus_per_rank"],
            launch.get("gpu_type"), launch["partition"], launch["cpus_per_rank"])


def _rates(run: RunPaths) -> list[float]:
    """images_per_s of the last logged windows."""
    with open(run.metrics, "rb") as file:
        lines = deque(file, _LINES_LOOKED_AT)
    rates = []
    for line in lines:
        try:
            rates.append(float(json.loads(line)["images_per_s"]))
        except (ValueError, KeyError, TypeError):
            continue  # a validation, or a torn line
    return rates


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return "less than a minute"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
