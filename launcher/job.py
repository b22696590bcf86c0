"""The job that submitit runs: one task a node, and that task is the node's supervisor.

The pickle holds one path and nothing else: after a requeue the same pickle runs again and the run
continues from its newest checkpoint. It names `launcher.job.TrainJob`, and the process that opens
it imports the run's own copy of the code, whatever its age: so this file does not move.
"""

from __future__ import annotations

import os
import stat
import sys
from functools import partial
from pathlib import Path

from launcher.frozen.freeze import complete_provenance
from launcher.frozen.identity import check_identity
from launcher.frozen.source import SOURCE_ROOT, runs_the_copy
from launcher.journal.events import record
from launcher.slurm.scheduler import node_names
from launcher.supervise.incarnation import Place, log_to_stderr
from launcher.supervise.supervisor import supervise
from launcher.supervise.workers import train_command
from resnet_dist.config.load import load_frozen
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.run.file_errors import waited_out
from resnet_dist.run.paths import RunPaths

REQUEUE_CODE = 77  # where SLURM has RequeueExit=77
USERS_GPUS = "RESNET_DIST_CUDA_VISIBLE_DEVICES"


class RunFailed(Exception):
    """The run ended and another attempt would not help; the message is the cause."""


class TrainJob:
    """Supervise the run in `run_dir` on this node.

    It has no `checkpoint` method on purpose: the supervisor handles signals, submitit does not.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> str:
        """Returns: "finished", "stopped", "requeued" or "followed". Raises: RunFailed."""
        os.umask(0o077)
        run = RunPaths(Path(self.run_dir))
        waited_out(partial(refuse_foreign, run))
        refuse_other_code(run)
        place = here()
        config = waited_out(partial(load_frozen, run.config))
        if place.node == 0 and run.provenance.exists():
            _check_record(run, config)
        log_to_stderr(place.node)
        if place.where == "local":
            _restore_gpus()
        outcome = supervise(run, config, place, self.command(run))
        if outcome.kind == "failed":
            raise RunFailed(outcome.cause)
        if outcome.kind == "requeue":
            sys.exit(REQUEUE_CODE)
        return outcome.kind

    def command(self, run: RunPaths) -> list[str]:
        """What one rank runs."""
        return train_command(run)


def here() -> Place:
    """This task's place, from the environment that SLURM or submitit's local executor made."""
    environment = os.environ
    if environment.get("SUBMITIT_EXECUTOR") == "slurm":
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else ""
        return Place("slurm", job=task or environment["SLURM_JOB_ID"],
                     restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
                     node=int(environment["SLURM_NODEID"]),
                     names=tuple(node_names(environment["SLURM_JOB_NODELIST"])))
    return Place("local", job=environment["SUBMITIT_LOCAL_JOB_ID"])


def refuse_foreign(run: RunPaths) -> None:
    """Raises: RunFailed where another user could have written what this job trusts."""
    for folder in (run.root, run.submitit):
        facts = folder.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RunFailed(f"{folder}: must belong to uid {os.getuid()} and be writable by nobody "
                            f"else; it belongs to uid {facts.st_uid}, mode "
                            f"{stat.filemode(facts.st_mode)}")


def refuse_other_code(run: RunPaths) -> None:
    """Raises: RunFailed where the run has a copy of its code and this process runs another."""
    if run.code.is_dir() and not runs_the_copy(run):
        raise RunFailed(f"{run.code}: holds the run's code, but the job runs {SOURCE_ROOT}; does "
                        "launch.setup change PYTHONPATH?")


def _check_record(run: RunPaths, config: Config) -> None:
    """Record the data set that a conversion before this job has made; refuse another one, and
    other settings or code, than the run has on record. Raises: RunFailed."""
    try:
        complete_provenance(run, config)
        check_identity(run, config)
    except ConfigError as error:
        cause = " ".join(str(error).split())
        record(run, "failed", cause=cause, step=0)
        raise RunFailed(cause) from None


def _restore_gpus() -> None:
    """submitit's local executor hides all GPUs that were not asked for by number."""
    own = os.environ.pop(USERS_GPUS, None)
    if own is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
