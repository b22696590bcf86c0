"""Everything that can be known about a job before it is queued: is it possible, what will it cost.

`check` refuses on the login node what would fail on the compute nodes, after hours in the queue.
`dry_run` shows what `submit` would do and does nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.frozen.freeze import anchored, refuse_taken
from launcher.slurm.cluster import cluster_problems, unasked_gpus
from launcher.slurm.sbatch import batch_script, python_command, refuse_inherited
from launcher.slurm.scheduler import have_slurm
from launcher.submission.costs import Estimate, disk_problems, estimate
from launcher.submission.submit import one_machine_problems, outside_any_job
from resnet_dist.config.load import config_to_dict, dump_config
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.run.paths import RunPaths


@dataclass(frozen=True)
class Order:
    """What `submit` was asked for."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    local: bool = False
    sweep: tuple[str, ...] = ()  # KEY=VALUE,VALUE
    parallel: int | None = None  # tasks of the sweep's array at once
    convert: str | None = None  # a source: the data set is made first
    evaluate: tuple[str, ...] = ()  # protocols
    after: tuple[str, ...] = ()  # runs or job ids to wait for
    trust_slurm: bool = False  # the cluster is not judged here


def check(config: Config, order: Order, runs: int = 1) -> Estimate:
    """What one of so many runs will cost. Raises: ConfigError with one line a problem."""
    manifest = check_dataset(config) if order.convert is None else None
    refuse_taken(config)
    slurm = have_slurm() and not order.local
    problems = [] if slurm else one_machine_problems(config)
    if slurm:
        python_command(config, None)  # a container that is not there
        refuse_inherited()
        problems += [] if order.trust_slurm else cluster_problems(config, runs)
    cost = estimate(config, manifest)
    problems += disk_problems(config, cost, runs)
    if problems:
        raise ConfigError("\n".join(problems))
    return replace(cost, note=unasked_gpus(config)) if slurm and not order.trust_slurm else cost


@dataclass(frozen=True)
class Plan:
    """What `submit` would do."""

    config: Config
    script: str | None  # None: the job would run on this machine
    slurm: str  # what SLURM says to the script
    cost: Estimate

    def as_json(self) -> dict[str, Any]:
        return {"config": config_to_dict(self.config), "script": self.script, "slurm": self.slurm,
                "estimate": self.cost.as_json()}


def dry_run(config: Config, order: Order, after: Sequence[str], runs: int) -> Plan:
    """The plan; nothing is queued and no run directory made. Raises: ConfigError."""
    cost = check(config, order, runs)
    config = anchored(config)
    if order.local or not have_slurm():
        return Plan(config, None, "", cost)
    script = batch_script(config, RunPaths(Path(config.runs) / str(config.name)), after)
    return Plan(config, script, _asked_slurm(script), cost)


def show(console: Console, plan: Plan, *, as_json: bool) -> None:
    if as_json:
        console.file.write(json.dumps(plan.as_json()) + "\n")
        return
    rows = [*plan.cost.rows(plan.config), *([("SLURM", plan.slurm)] if plan.slurm else []),
            ("dry run", "nothing was queued")]
    for title, text in {
            "resolved configuration": dump_config(plan.config),
            "batch script": plan.script or "none: the job would run on this machine\n",
            "estimate": "".join(f"{what:>12}  {value}\n" for what, value in rows)}.items():
        console.print(f"[bold]{title}[/]")
        console.print(text, markup=False, highlight=False, end="", soft_wrap=True)


def _asked_slurm(script: str) -> str:
    """`sbatch --test-only`: when the job would start. Raises: ConfigError with SLURM's refusal."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, outside_any_job():
        file.write(script)
        file.flush()
        try:
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True,
                                  text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "does not answer"
    words = " ".join((done.stderr or done.stdout).split()).replace("sbatch: ", "")
    if done.returncode:
        raise ConfigError(f"launch.* : SLURM would refuse the job ({words}); `sinfo` lists "
                          "partitions and their limits, `--local` runs here")
    return re.sub(r"^Job \d+ to start", "would start it", words)
