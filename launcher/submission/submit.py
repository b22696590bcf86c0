"""A frozen run directory -> a job: on SLURM, or on this machine where there is no sbatch.

`submit` returns when the job is queued (SLURM) or started (here). A job on this machine belongs to
a session of its own, so it survives the terminal and the process that submitted it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.frozen.source import frozen_environment, quoted
from launcher.job import USERS_GPUS, TrainJob
from launcher.journal.events import record
from launcher.slurm.sbatch import executor
from launcher.slurm.scheduler import have_slurm
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.run.paths import RunPaths

NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit's local default would end a job after two minutes


def submit(config: Config, run: RunPaths, *, local: bool = False,
           after: Sequence[str] = ()) -> str:
    """Queue the run; the job's id. Raises: ConfigError where it cannot be queued as configured.

    Args:
        after: jobs that must end well before this one starts.
    """
    local = local or not have_slurm()
    if problems := one_machine_problems(config) if local else []:
        raise ConfigError("\n".join(problems))
    announce(config, run, where="local" if local else "slurm", after=after)
    try:
        job = _start_detached(run) if local else queue(config, run, TrainJob(str(run.root)), after)
    except BaseException as error:  # Ctrl-C while sbatch waits for its controller, too
        reason = " ".join(str(error).split())[:300] or "interrupted"
        record(run, "failed", cause=f"not submitted: {reason}", step=0)
        raise
    record(run, "queued", job=job)
    return job


def announce(config: Config, run: RunPaths, *, where: str, after: Sequence[str] = ()) -> None:
    """Make the run ready for a job, and say so in its events."""
    prepare(run)
    run.stop_request.unlink(missing_ok=True)
    launch = config.launch
    record(run, "submitted", where=where, nodes=launch.nodes, ranks_per_node=launch.ranks_per_node,
           steps=config.steps, batch_size=config.batch_size, after=list(after))


def one_machine_problems(config: Config) -> list[str]:
    """Why a job cannot run on this machine alone."""
    if config.launch.nodes == 1:
        return []
    why = "--local runs on this machine" if have_slurm() else "there is no sbatch here"
    return [f"launch.nodes = {config.launch.nodes}: {why}; set launch.nodes=1"]


def prepare(run: RunPaths) -> None:
    """A private folder for pickles and logs, and the secret of the control channel."""
    if run.submitit.is_dir() and run.submitit.stat().st_uid != os.getuid():
        raise ConfigError(f"RUN = {run.name}: {run.submitit} belongs to uid "
                          f"{run.submitit.stat().st_uid}; pickles are only run for their owner")
    run.submitit.mkdir(mode=0o700, exist_ok=True)
    run.submitit.chmod(0o700)
    run.secret.unlink(missing_ok=True)
    with open(os.open(run.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def queue(config: Config, run: RunPaths, job: Callable[[], str], after: Sequence[str] = ()) -> str:
    """Hand the job to SLURM; its id. Raises: ConfigError where SLURM refuses it."""
    slurm = executor(config, run.submitit, run.root, code=quoted(run) if run.code.is_dir() else "",
                     after=after)
    with handed_to_slurm():
        return str(slurm.submit(job).job_id)


@contextmanager
def outside_any_job(**variables: str) -> Iterator[None]:
    """A job that is submitted inside takes over nothing of a job that submits it.

    Args:
        variables: that it does take over.
    """
    from submitit.helpers import clean_env

    before = dict(os.environ)
    try:
        with clean_env():
            os.environ |= {key: before[key] for key in before.keys() & {"SLURM_CONF"}} | variables
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def handed_to_slurm(**variables: str) -> Iterator[None]:
    """What is submitted inside has private pickles and logs, and a refusal is the user's message.

    Args:
        variables: that the job finds in its environment.

    Raises: ConfigError.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    before = os.umask(0o077)
    try:
        with outside_any_job(**variables):
            yield
    except (FailedJobError, FailedSubmissionError, OSError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "sbatch" in line.lower()]
        reason = lines[-1] if lines else " ".join(str(error).split())[:300] or "no reason given"
        raise ConfigError(f"launch.* : SLURM refused the job ({reason}); `sinfo` lists partitions "
                          "and their limits, `--local` runs here") from None
    finally:
        os.umask(before)


def _start_detached(run: RunPaths) -> str:
    """Submit from a process in a session of its own, which hands its session to the job."""
    answer = run.submitit / "local_job"
    answer.unlink(missing_ok=True)
    environment = dict(os.environ)
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment[USERS_GPUS] = environment["CUDA_VISIBLE_DEVICES"]
    with open(run.submitit / "local.log", "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.submission.submit", str(run.root)],
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, env=environment)
    code = process.wait()
    if code or not answer.exists():
        raise RuntimeError(f"the local executor did not start (exit {code}); see {output.name}")
    return answer.read_text().strip()


def _submit_here(run: RunPaths) -> None:
    """The child of `_start_detached`."""
    import submitit

    os.umask(0o077)
    # Only the job runs the copy: a run that an older version froze is submitted by today's code.
    os.environ |= frozen_environment(run) if run.code.is_dir() else {}
    executor = submitit.LocalExecutor(folder=run.submitit)
    executor.update_parameters(timeout_min=NO_LIMIT_MIN, tasks_per_node=1)
    job = executor.submit(TrainJob(str(run.root)))
    time.sleep(0.05)
    if job._process is not None and job._process.poll() is not None:
        sys.exit(1)
    (run.submitit / "local_job").write_text(f"{job.job_id}\n")


if __name__ == "__main__":
    _submit_here(RunPaths(Path(sys.argv[1])))
