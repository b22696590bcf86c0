"""Jobs submitted together by one command: a sweep as a job array, a chain through dependencies.

    convert (array, finishing job)  ->  train (one job, or an array of one run each)  ->  evaluate

An arrow is SLURM's `afterok`: where a job fails, those behind it are ended by SLURM, and `status`
says which one it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.frozen.freeze import create_run, find_run
from launcher.frozen.source import frozen_environment
from launcher.job import TrainJob
from launcher.journal.events import record
from launcher.slurm.sbatch import environment_lines, executor
from launcher.slurm.scheduler import cancel, have_slurm
from launcher.submission.evaluation import EvalJob, queue_evaluation
from launcher.submission.preflight import Order, Plan, check, dry_run
from launcher.submission.submit import announce, handed_to_slurm, submit
from launcher.watch.status import run_status
from resnet_dist.config.load import load_config
from resnet_dist.config.rules import NAME_PATTERN
from resnet_dist.config.schema import EVAL_PROTOCOLS, Config, ConfigError
from resnet_dist.run.paths import RunPaths

CONVERT_PREFIX = "convert."
_NOT_SWEPT = ("name", "runs", "data", "launch", "cluster")


@dataclass(frozen=True)
class Submitted:
    run: RunPaths
    job: str
    evaluations: tuple[str, ...] = ()  # job ids
    conversion: tuple[str, ...] = ()
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        more = {"evaluations": self.evaluations, "note": self.note, "conversion": self.conversion}
        return {"run": str(self.run.root), "job": self.job,
                **{key: value for key, value in more.items() if value}}


def show(console: Console, submitted: Sequence[Submitted]) -> None:
    """What was queued, and how to watch it."""
    def say(what: str, job: str, rest: str = "") -> None:
        console.print(f"[green]{what}[/]  job {job}{rest}", highlight=False, soft_wrap=True)

    if submitted[0].note:
        console.print(f"[yellow]note[/]  {submitted[0].note}", highlight=False, soft_wrap=True)
    if submitted[0].conversion:
        say("conversion", ", ".join(submitted[0].conversion))
    for each in submitted:
        say("submitted", each.job, f", run directory {each.run.root}")
        for job in each.evaluations:
            say("evaluation", job, f", after {each.job}")
    there = submitted[0].run.root.parent
    which = [] if len(submitted) > 1 else [submitted[0].run.name]
    runs = [] if there == Path("runs").absolute() else ["--runs", str(there)]
    console.print("watch it:  " + " ".join(["resnet-dist", "status", *which, "--watch", *runs]),
                  highlight=False, soft_wrap=True)


def submit_order(order: Order) -> list[Submitted]:
    """Check everything, make the run directories, queue the jobs. Raises: ConfigError."""
    members = configurations(order)
    first = members[0][1]
    after = _jobs(order.after, first.runs)
    cost = check(first, order, runs=len(members))
    identity = {"id": f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"}
    runs: list[RunPaths] = []
    conversion: tuple[str, ...] = ()
    try:
        for values, config in members:
            origin = {"sweep": {**identity, "values": values}} if order.sweep else {}
            runs.append(create_run(config, origin=origin,
                                   dataset_follows=order.convert is not None,
                                   like=runs[0] if runs else None))
        if order.convert is not None:
            from data_prep.slurm import job_folder

            conversion = _queue_conversion(order, first, runs[0])
            for run in runs:
                record(run, "conversion queued", conversion=list(conversion),
                       conversion_logs=str(job_folder(Path(str(first.data.path)))))
        jobs = _queue(order, [config for _, config in members], runs, identity["id"],
                      (*after, *conversion[-1:]))
    except BaseException:
        for job in conversion:  # it runs the code of a run that will not be
            cancel(job, kill=False)
        for run in runs:
            shutil.rmtree(run.root)
        raise
    try:
        return [Submitted(run, job, tuple(queue_evaluation(config, run,
                                                           EvalJob(str(run.root), each), job)
                                          for each in order.evaluate), conversion, cost.note)
                for (_, config), run, job in zip(members, runs, jobs, strict=True)]
    except ConfigError as error:
        queued = ", ".join(f"{run.name} as job {job}" for run, job in zip(runs, jobs, strict=True))
        raise ConfigError(f"--eval = {', '.join(order.evaluate)}: {error}\nthe training is queued: "
                          f"{queued}; `resnet-dist eval RUN` evaluates it, `resnet-dist stop RUN` "
                          "takes it back") from None


def plan_order(order: Order) -> Plan:
    """What `submit` would do, shown by the first run. Raises: ConfigError."""
    members = configurations(order)
    after = _jobs(order.after, members[0][1].runs)
    return dry_run(members[0][1], order, after, runs=len(members))


def configurations(order: Order) -> list[tuple[dict[str, str], Config]]:
    """Each run's swept values and configuration; one without values where nothing is swept.

    Raises: ConfigError.
    """
    for protocol in order.evaluate:
        if protocol not in EVAL_PROTOCOLS:
            raise ConfigError(f"--eval = {protocol}: pick one of {', '.join(EVAL_PROTOCOLS)}")
    needs = {"--sweep": order.sweep, "--convert": order.convert, "--eval": order.evaluate,
             "--after": order.after}
    asked = next((f"{key} = {value if isinstance(value, str) else ', '.join(value)}"
                  for key, value in needs.items() if value), None)
    if asked and (order.local or not have_slurm()):
        why = "--local runs on this machine" if order.local else "there is no sbatch here"
        raise ConfigError(f"{asked}: is carried out by SLURM and {why}; submit one run after the "
                          "other")
    plain = _plain(order)
    if order.convert is None and len(plain) < len(order.overrides):
        stray = next(item for item in order.overrides if item.startswith(CONVERT_PREFIX))
        raise ConfigError(f"{stray.replace('=', ' = ', 1)}: is for a conversion; name what to "
                          "convert with --convert SOURCE")
    if not order.sweep:
        return [({}, load_config(order.recipe, plain))]
    base = load_config(order.recipe, plain)
    found = []
    for values in _combinations(order.sweep):
        name = "-".join([str(base.name), *(_label(*pair) for pair in values.items())])
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigError(f"name = {name}: a sweep's run is too long a name; name=SHORT helps")
        config = load_config(order.recipe, [*plain, *map("=".join, values.items())])
        found.append((values, replace(config, name=name)))
    names = [config.name for _, config in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--sweep = {', '.join(order.sweep)}: makes {twice} twice; leave out "
                          "what is repeated")
    return found


def _combinations(sweep: Sequence[str]) -> Iterator[dict[str, str]]:
    """`["seed=0,1", "optimizer.lr=0.1,0.2"]` -> four dictionaries. Raises: ConfigError."""
    axes: dict[str, list[str]] = {}
    for item in sweep:
        found = re.fullmatch(r"([A-Za-z_][\w.]*)=(.+)", item, re.DOTALL)
        values = [each for each in re.split(r",(?![^\[{]*[\]}])", found[2])] if found else []
        if not found or not all(values):
            raise ConfigError(f"--sweep = {item}: write it as key=value,value, e.g. seed=0,1,2")
        key = found[1]
        if key.split(".")[0] in _NOT_SWEPT:
            raise ConfigError(f"--sweep = {item}: runs of one array share {key.split('.')[0]}; "
                              "submit them one by one")
        if key in axes:
            raise ConfigError(f"--sweep = {item}: {key} is swept twice; write all values in one")
        axes[key] = values
    for choice in itertools.product(*axes.values()):
        yield dict(zip(axes, choice, strict=True))


def _label(key: str, value: str) -> str:
    """`optimizer.lr`, `0.05` -> `lr0_05`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key.rpartition(".")[2] + value)


def _queue(order: Order, configs: list[Config], runs: list[RunPaths], sweep: str,
           after: Sequence[str]) -> list[str]:
    """Queue the training jobs: their ids."""
    if not order.sweep:
        return [submit(configs[0], runs[0], local=order.local, after=after)]
    folder = runs[0].root.parent / ".sweeps" / sweep
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    # A task finds its run's code by its number.
    copies = folder / "code"
    copies.write_text("".join(f"{run.code}\n" for run in runs))
    code = f'"$(sed -n $((SLURM_ARRAY_TASK_ID + 1))p {shlex.quote(str(copies))})"'
    named = dataclasses.replace(configs[0], name=load_config(order.recipe, _plain(order)).name)
    array = executor(named, folder, runs[0].root.parent, code=code, after=after,
                     parallel=order.parallel)
    for config, run in zip(configs, runs, strict=True):
        announce(config, run, where="slurm", after=after)
    with handed_to_slurm(), array.batch():
        jobs = [array.submit(TrainJob(str(run.root))) for run in runs]
    ids = [str(job.job_id) for job in jobs]
    for run, job in zip(runs, ids, strict=True):
        record(run, "queued", job=job, logs=str(folder))
    return ids


def _plain(order: Order) -> list[str]:
    return [item for item in order.overrides if not item.startswith(CONVERT_PREFIX)]


def _queue_conversion(order: Order, config: Config, run: RunPaths) -> tuple[str, ...]:
    """Queue what makes the data set; its jobs, the finishing one last. () where it is there."""
    from data_prep.convert import parse_convert_overrides
    from data_prep.slurm import submit_conversion

    assert order.convert is not None, "asked by its caller"
    launch = config.launch
    ours = {"slurm_partition": launch.partition, "slurm_account": launch.account}
    given = [item.removeprefix(CONVERT_PREFIX) for item in order.overrides
             if item.startswith(CONVERT_PREFIX)]
    options = [f"{key}={value}" for key, value in ours.items()
               if value and not any(item.startswith(f"{key}=") for item in given)] + given
    if config.data.path is None:
        raise ConfigError("data.path = null: name the data set to make, e.g. data=data/imagenet")
    with handed_to_slurm(**frozen_environment(run)):
        submitted = submit_conversion(order.convert, Path(config.data.path),
                                      parse_convert_overrides(options),
                                      setup=environment_lines(launch))
    if submitted is None:
        return ()
    return tuple(dict.fromkeys(str(job.job_id).split("_")[0] for job in submitted[1]))


def _jobs(after: Sequence[str], runs: str) -> list[str]:
    """Job ids of what to wait for. Raises: ConfigError."""
    found = []
    for name in after:
        if re.fullmatch(r"\d+(_\d+)?", name):
            found.append(name)
            continue
        status = run_status(find_run(name, runs))
        if status.where != "slurm" or not status.job:
            raise ConfigError(f"--after = {name}: has no job in SLURM; name one that has")
        if status.over and status.state != "finished":
            raise ConfigError(f"--after = {name}: is {status.state}; `resnet-dist resume {name}` "
                              "first")
        if not status.over:
            found.append(status.job)
    return found
