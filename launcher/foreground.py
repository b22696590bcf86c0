"""Verbs that run here and now: `train`, `eval`, `export`.

`train` is one rank where torchrun started it (RANK is set), and otherwise the supervisor with all
ranks of one node as its children. torch is only ever imported by the child processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.doctor.machine import examine, show
from launcher.doctor.nodes import examine_nodes
from launcher.frozen.freeze import (
    anchored,
    create_run,
    differences,
    find_run,
    read_provenance,
    renew_code,
)
from launcher.frozen.identity import check_identity
from launcher.frozen.source import SOURCE_ROOT, code_fingerprint
from launcher.submission.costs import disk_problems, estimate
from launcher.supervise.here import supervise_here
from launcher.watch.status import run_status
from resnet_dist.config.explain import nearest
from resnet_dist.config.load import load_config, load_frozen
from resnet_dist.config.rules import world_problems
from resnet_dist.config.schema import EVAL_PROTOCOLS, Config, ConfigError
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.models.catalog.names import model_names
from resnet_dist.run.paths import RunPaths


def train_here(recipe: Path, overrides: list[str], allow: Collection[str] = (), *,
               as_json: bool = False) -> int:
    """Train in the foreground and return the exit code. The same command again resumes.

    Args:
        allow: kinds of difference to what the run was, to go on with.
        as_json: when it has ended, print what `status --json` would.

    Raises: ConfigError on bad input, before a process is started.
    """
    config = load_config(recipe, overrides)
    if "RANK" in os.environ:
        run = _run_for_rank(config, allow)
        code = subprocess.run([sys.executable, "-m", "resnet_dist.train", str(run.root)]).returncode
        if as_json and int(os.environ["RANK"]) == 0:
            sys.stdout.write(json.dumps(run_status(run).as_json()) + "\n")
        return code
    if config.launch.nodes != 1:
        raise ConfigError(f"launch.nodes = {config.launch.nodes}: `train` runs on this machine; "
                          "set launch.nodes=1, or use `resnet-dist submit`")
    run = _create_or_reopen(config, allow)
    code = supervise_here(run)
    if as_json:
        sys.stdout.write(json.dumps(run_status(run).as_json()) + "\n")
    return code


def _run_for_rank(config: Config, allow: Collection[str]) -> RunPaths:
    """The run directory for one torchrun rank: rank 0 makes it, the others wait for it."""
    rank, world = _torchrun_place()
    problems = world_problems(config, world)
    if problems:
        raise ConfigError("\n".join([f"WORLD_SIZE = {world}: as torchrun has set it", *problems]))
    if rank == 0:
        return _create_or_reopen(config, allow)
    run = RunPaths(Path(config.runs).absolute() / str(config.name))
    deadline = time.monotonic() + 60
    while not run.provenance.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"runs = {config.runs}: rank 0's run directory {run.root} did not "
                              "appear within 60 s; is it on a shared file system?")
        time.sleep(0.1)
    return run


def _torchrun_place() -> tuple[int, int]:
    """(rank, world size) as torchrun set them. Raises: ConfigError where variables are left over
    from something else."""
    remedy = ("start it with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
              "MASTER_PORT to train with the supervisor")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(key, "")
        if not value.isdigit():
            raise ConfigError(f"{key} = {value!r}: RANK = {os.environ['RANK']!r} is set, and this "
                              f"is no number; {remedy}")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world:
        raise ConfigError(f"RANK = {rank}: is not below WORLD_SIZE = {world}; {remedy}")
    host = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(host or None, int(os.environ["MASTER_PORT"]))
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR = {host!r}: is not found ({error}); {remedy}") from None
    return rank, world


def _create_or_reopen(config: Config, allow: Collection[str]) -> RunPaths:
    run = RunPaths(Path(config.runs).absolute() / str(config.name))
    if not run.config.is_file():
        if problems := disk_problems(config, estimate(config, check_dataset(config))):
            raise ConfigError(problems[0])
        return create_run(config)
    check_dataset(config)
    changed = differences(load_frozen(run.config), anchored(config))
    if changed:
        raise ConfigError(f"name = {config.name}: {run.root} exists with other settings "
                          f"({'; '.join(changed)}); `resnet-dist resume {config.name} key=value` "
                          "changes what may change, name=OTHER starts another run")
    # In the foreground runs what is installed; the run's copy of the code follows it.
    check_identity(run, config, allow, code=SOURCE_ROOT)
    if read_provenance(run).get("code") != {"sha256": code_fingerprint(run.code)}:
        renew_code(run)
    return run


def evaluate_here(name: str, runs: str, *, ensemble: tuple[str, ...] = (), responses: bool = False,
                  **asked: str | int | None) -> dict[str, Any] | None:
    """Evaluate a checkpoint, or several together, in a child process; None on torchrun's others.

    asked: step, split, protocol, size, resize, weights, batch_size; None leaves it as configured.
    Raises: ConfigError on bad input.
    """
    choices = {"protocol": EVAL_PROTOCOLS, "weights": ("raw", "ema")}
    for key, valid in choices.items():
        if asked.get(key) not in (None, *valid):
            raise ConfigError(f"--{key} = {asked[key]}: pick one of {', '.join(valid)}")
    run = find_run(name, runs)
    load_frozen(run.config)
    command = [sys.executable, "-m", "resnet_dist.evaluate.report", str(run.root)]
    for key, value in asked.items():
        if value is not None:
            command += [f"--{key.replace('_', '-')}", str(value)]
    for member in ensemble:
        other, _, step = member.partition("@")
        command += ["--ensemble", f"{find_run(other, runs).root}@{step}"]
    if responses:
        command.append("--responses")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    lines = done.stdout.splitlines()
    result: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return result


def export_here(name: str, runs: str, form: str, path: Path, step: int | None) -> int:
    """Write a checkpoint's weights to `path`; the step they are of. Raises: ConfigError."""
    if path.exists():
        raise ConfigError(f"--out = {path}: exists; name another file")
    command = [sys.executable, "-m", "resnet_dist.evaluate.export",
               str(find_run(name, runs).root), form, str(path),
               *([] if step is None else ["--step", str(step)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return int(done.stdout)


def summarize_here(name: str, *, as_json: bool) -> int:
    """Print a model's layers, output sizes, parameters and FLOPs. Raises: ConfigError."""
    if name not in model_names():
        raise ConfigError(f"--model = {name}: no such model{nearest(name, model_names())}")
    command = [sys.executable, "-m", "resnet_dist.models.analysis.summary", name]
    return subprocess.run(command + (["--json"] if as_json else [])).returncode


def doctor_here(console: Console, overrides: list[str], *, slurm: bool, data: str | None,
                model: str | None, as_json: bool) -> int:
    """Examine this machine or nodes of the cluster; the exit code. Raises: ConfigError."""
    if model is not None:
        return summarize_here(model, as_json=as_json)
    if slurm:
        told = overrides if data is None else [*overrides, f"data={data}"]
        findings = examine_nodes(console, told)
    elif overrides:
        raise ConfigError(f"{overrides[0].replace('=', ' = ', 1)}: is for a job; add --slurm")
    else:
        findings = examine(data=data)
    if as_json:
        console.file.write(json.dumps(findings) + "\n")
    else:
        show(console, findings)
    return int(any(finding["state"] == "problem" for finding in findings))
