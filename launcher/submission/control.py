"""Verbs on a run that exists: stop, resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection

from launcher.frozen.freeze import renew_code, rewrite_config
from launcher.frozen.identity import check_identity
from launcher.journal.events import Process, record
from launcher.slurm import scheduler
from launcher.submission.submit import submit
from launcher.watch.status import RunStatus, statuses
from resnet_dist.config.load import (
    config_from_dict,
    config_to_dict,
    flat,
    load_frozen,
    parse_overrides,
    with_overrides,
)
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.run.paths import RunPaths

_MAY_CHANGE = ("cluster", "launch", "checkpoint", "log", "eval", "data", "divergence")


def stop(run: RunPaths, *, now: bool) -> str:
    """End a run's job for good; what was done, in words. Raises: ConfigError where none is.

    Args:
        now: without a checkpoint.
    """
    status = _asked(run)
    if status.over:
        raise ConfigError(f"RUN = {run.name}: is {status.state}, there is nothing to stop")
    if status.where == "slurm" and (now or status.state in ("pending", "requeued")):
        if refusal := scheduler.cancel(status.job, kill=now):
            raise ConfigError(f"RUN = {run.name}: SLURM did not cancel job {status.job} "
                              f"({refusal}); try again, or scancel {status.job}")
        record(run, "stopped", cause="stopped at once" if now else "stopped before it began",
               step=status.checkpoint_step or 0)
        return f"job {status.job} is cancelled"
    if now:
        return _kill_here(run, status)
    run.stop_request.touch(mode=0o600)
    return f"asked the job to save and stop; `resnet-dist status {run.name}` shows when it has"


def _kill_here(run: RunPaths, status: RunStatus) -> str:
    started = [event for event in status.events if event["event"] == "started"]
    process = Process.of(started[-1]) if started else None
    alive = process.alive() if process else False
    if alive is None and process:
        raise ConfigError(f"RUN = {run.name}: runs on {process.host}; stop it there, or without "
                          "--now from here")
    if alive and process:
        os.kill(process.pid, signal.SIGKILL)  # the kernel then kills its workers
    record(run, "stopped", cause="stopped at once", step=status.checkpoint_step or 0)
    return "killed"


CODES = ("frozen", "current")


def resume(run: RunPaths, overrides: list[str], *, local: bool, code: str = "frozen",
           allow: Collection[str] = ()) -> str:
    """Queue a stopped, failed or finished run again; the job's id.

    What defines the training (model, batch, seed, schedule, ...) cannot change.

    Args:
        code: "frozen": what the run was submitted with; "current": what is installed now.
        allow: kinds of difference to what the run was, e.g. an edited config.yaml, to go on with;
            "schedule": that other steps change the learning rate from here on.

    Raises: ConfigError.
    """
    if code not in CODES:
        raise ConfigError(f"--code = {code}: pick one of {', '.join(CODES)}")
    status = _asked(run)
    if not status.over:
        raise ConfigError(f"RUN = {run.name}: is {status.state} as job {status.job}; "
                          f"`resnet-dist stop {run.name}` first")
    frozen = load_frozen(run.config)
    config = _changed(frozen, overrides)
    done = status.checkpoint_step or 0
    if done >= config.steps and status.state == "finished":
        raise ConfigError(f"steps = {config.steps}: the run has finished step {done}; "
                          f"give it more, e.g. steps={done + max(1, done // 10)}")
    if config.data != frozen.data:
        config = dataclasses.replace(config, data=dataclasses.replace(
            config.data, path=os.path.abspath(str(config.data.path))))
        check_dataset(config)
    if jump := _rate_jump(frozen, config, done):
        if "schedule" not in allow:
            raise ConfigError(f"steps = {config.steps}: {jump}; go on with it: --allow schedule, "
                              "or start another run with name=OTHER init_from=WEIGHTS")
        record(run, "allowed", kind="schedule", differences=[jump])
    allow = [kind for kind in allow if kind != "schedule"]
    check_identity(run, dataclasses.replace(frozen, data=config.data),
                   [*allow, *(["code"] if code == "current" else [])])
    if config != frozen:
        rewrite_config(run, config)
    if code == "current" or not run.code.is_dir():
        before, after = renew_code(run)
        record(run, "code", before=before, after=after)
    return submit(config, run, local=local or status.where == "local")


def _rate_jump(before: Config, after: Config, step: int) -> str:
    """How other `steps` change the learning rate at `step`, in words; "" where they do not.

    The schedule is asked in a process that may import torch.
    """
    if before.steps == after.steps or before.schedule.name not in ("cosine", "linear", "one_cycle"):
        return ""
    code = ("import json, sys; from resnet_dist.config.load import config_from_dict; "
            "from resnet_dist.engine.optim import lr_at; "
            "both = [config_from_dict(tree) for tree in json.load(sys.stdin)]; "
            f"print(*(lr_at(c.schedule, c.optimizer.lr, {step}, c.steps) for c in both))")
    done = subprocess.run([sys.executable, "-c", code], text=True, check=True,
                          input=json.dumps([config_to_dict(before), config_to_dict(after)]),
                          stdout=subprocess.PIPE)
    old, new = map(float, done.stdout.split())
    if old == new:
        return ""
    return (f"schedule.name = {after.schedule.name} has the rate {new:.3g} at step {step}, where "
            f"{before.steps} steps have {old:.3g}")


def _asked(run: RunPaths) -> RunStatus:
    """The run's status with SLURM's word."""
    return statuses([run])[0][0]


def _changed(frozen: Config, overrides: list[str]) -> Config:
    """The frozen configuration with overrides. Raises: ConfigError on what must not change."""
    tree = parse_overrides(overrides)
    for key in tree:
        if key not in ("steps", "profile") and key not in _MAY_CHANGE:
            said, value = next(iter(flat({key: tree[key]}).items()), (key, tree[key]))
            raise ConfigError(f"{said} = {value}: defines the training and cannot change when "
                              "it resumes; only steps, profile, "
                              + ", ".join(f"{section}.*" for section in _MAY_CHANGE[1:])
                              + " can. Start another run with name=OTHER")
    return config_from_dict(with_overrides(frozen, overrides))
