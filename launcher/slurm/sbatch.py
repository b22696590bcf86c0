"""A configuration in SLURM's words: what submitit is told, and the batch script it then writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.frozen.source import frozen_exports, quoted
from resnet_dist.config.schema import Config, ConfigError, LaunchConfig
from resnet_dist.run.paths import RunPaths

# The batch shell must outlive the signals that end the job: while it waits for srun, the
# supervisors save.
_DEAF = "trap '' TERM USR1 USR2"
_MODULE = "type module >/dev/null 2>&1 || . /etc/profile  # a batch shell is no login shell"


def gpus_per_node(config: Config) -> int:
    """GPUs that a node is asked for."""
    each = config.launch.gpus_per_rank
    if each is None:
        each = 1 if config.device == "cuda" else 0
    return each * config.launch.ranks_per_node


def sbatch_parameters(config: Config, where: Path | None = None, *, code: str = "",
                      after: Sequence[str] = (), parallel: int | None = None) -> dict[str, Any]:
    """What submitit's SLURM executor is told.

    Args:
        where: folder of the run or runs, mounted where the job runs in a container.
        code: shell word that names the copy of the code which the job runs; "": what is installed.
        after: jobs that must end well before this one starts.
        parallel: tasks of an array that run at once; None: as many as there is room for.
    """
    launch, ranks = config.launch, config.launch.ranks_per_node
    gpus = gpus_per_node(config)
    srun = ["--cpu-bind=none", "--kill-on-bad-exit=0"]
    extra: dict[str, Any] = {"requeue": True, "open-mode": "append", **launch.options}
    if launch.cpus_per_rank is None:
        extra["exclusive"] = True  # all cores of the nodes, as the field's default promises
    else:
        # srun does not take the number over from sbatch since SLURM 22.05.
        srun.append(f"--cpus-per-task={ranks * launch.cpus_per_rank}")
    if gpus and launch.gpu_request == "gres":
        extra["gres"] = ":".join(["gpu", *filter(None, [launch.gpu_type]), str(gpus)])
    elif gpus and launch.gpu_request == "gpus-per-node":
        extra["gpus-per-node"] = ":".join([*filter(None, [launch.gpu_type]), str(gpus)])
    if launch.container and launch.container_runtime == "pyxis":
        mounts = ",".join(f"{path}:{path}" for path in _mounts(config, where))
        srun += [f"--container-image={launch.container}", f"--container-mounts={mounts}",
                 *launch.container_options]
    if after:
        # A job whose turn can never come is ended by SLURM, not left in the queue.
        extra |= {"dependency": ":".join(["afterok", *after]), "kill-on-invalid-dep": "yes"}
    parameters = {
        "slurm_array_parallelism": parallel,
        "name": config.name, "nodes": launch.nodes, "tasks_per_node": 1,
        "timeout_min": launch.time_minutes, "mem_gb": launch.mem_gb,
        "cpus_per_task": ranks * launch.cpus_per_rank if launch.cpus_per_rank else None,
        "slurm_partition": launch.partition, "slurm_account": launch.account,
        "slurm_qos": launch.qos, "slurm_constraint": launch.constraint,
        "slurm_signal_delay_s": launch.grace_s, "slurm_srun_args": srun,
        "slurm_setup": [_DEAF, *environment_lines(launch), *_code_lines(launch, code)],
        "slurm_additional_parameters": extra,
    }
    return {key: value for key, value in parameters.items() if value is not None}


def refuse_inherited() -> None:
    """Raises: ConfigError where a variable of the shell would overrule what the job is told."""
    keys = {"ACCOUNT": "account", "CONSTRAINT": "constraint", "PARTITION": "partition",
            "QOS": "qos", "TIMELIMIT": "time_minutes"}
    for name, value in os.environ.items():
        if name.startswith("SBATCH_"):
            word = name.removeprefix("SBATCH_")
            key = f"launch.{keys[word]}" if word in keys else "launch.options"
            raise ConfigError(f"{name} = {value}: sbatch would obey it and not the configuration; "
                              f"`unset {name}`, and say what you mean with {key}")


def environment_lines(launch: LaunchConfig) -> list[str]:
    """Shell lines that make a node ready, in the order in which the fields stand."""
    lines = [_MODULE] if launch.modules else []
    lines += [f"module load {shlex.quote(name)} || exit 1" for name in launch.modules]
    lines += [f"export {name}={shlex.quote(str(value))}"
              for name, value in launch.environment.items()]
    return [*lines, *launch.setup]


def python_command(config: Config, where: Path | None) -> str | None:
    """How a node starts Python; None: with the interpreter that submits."""
    launch = config.launch
    if not launch.container:
        return None
    if launch.container_runtime == "pyxis":
        return launch.container_python
    if not Path(launch.container).exists():
        raise ConfigError(f"launch.container = {launch.container}: no such file; name an image "
                          "that the nodes see, too")
    binds = [f"--bind={path}" for path in _mounts(config, where)]
    return shlex.join(["apptainer", "exec", *(["--nv"] if gpus_per_node(config) else []), *binds,
                       *launch.container_options, launch.container, launch.container_python])


def executor(config: Config, folder: Path, where: Path | None = None, *, code: str = "",
             after: Sequence[str] = (), parallel: int | None = None) -> Any:
    """submitit's SLURM executor, told everything: see `sbatch_parameters`. Raises: ConfigError."""
    import submitit

    refuse_inherited()
    made = submitit.AutoExecutor(folder=folder, cluster="slurm",
                                 slurm_python=python_command(config, where))
    made.update_parameters(**sbatch_parameters(config, where, code=code, after=after,
                                               parallel=parallel))
    return made


def batch_script(config: Config, run: RunPaths, after: Sequence[str] = ()) -> str:
    """The script that submitit will hand to sbatch for this run, word for word."""
    slurm = executor(config, run.submitit, run.root, code=quoted(run), after=after)._executor
    text: str = slurm._make_submission_file_text(slurm._submitit_command_str, "0")
    return text


def _code_lines(launch: LaunchConfig, code: str) -> list[str]:
    if not code:
        return []
    lines = frozen_exports(code)
    if launch.container and launch.container_runtime == "apptainer":
        lines += [f'export APPTAINERENV_{name}="${name}"'
                  for name in ("PYTHONPATH", "PYTHONSAFEPATH")]
    return lines


def _mounts(config: Config, where: Path | None) -> list[str]:
    """What a job reads and writes."""
    paths = [str(where) if where else None, config.data.path, config.init_from]
    return [os.path.abspath(path) for path in paths if path]
