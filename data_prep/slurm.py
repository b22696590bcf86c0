"""`resnet-dist convert --slurm`: the shards of a plan as a job array, then one job that finishes.

The plan is made here, once; every task takes a range of its shards and skips those that are done,
so a task that SLURM requeues, or a second submission, costs nothing twice. The finishing job waits
for the array to end, whatever its end, and writes the manifest if all shards are there: the
terminal may be closed meanwhile.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.conversion.finish import finish
from data_prep.conversion.plan import Plan, load_plan
from data_prep.conversion.pool import ConvertError
from data_prep.conversion.progress import Ticker
from data_prep.conversion.shown import shown
from data_prep.conversion.write import read_record
from data_prep.convert import name_of, only_one, opened_for, prepare, run
from data_prep.options import ConvertConfig
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import Manifest, load_manifest
from resnet_dist.run.paths import DatasetPaths

log = logging.getLogger(__name__)
WORKERS = 8  # processes of a task where the options say nothing
STRAGGLERS_S = 600.0  # that the finishing job waits for tasks which still hold the directory
POLL_S = 2.0
LOST_S = 60.0  # after the finishing job has left the queue: for slow shared file systems


def convert_slurm(source: str, dst: Path, config: ConvertConfig, progress: bool = False, *,
                  wait: bool = True, tell: Callable[[dict[str, Any]], None] | None = None
                  ) -> Manifest | None:
    """Submit a conversion; with `wait`, follow it to its manifest. `tell` is shown the plan.

    Raises: ConfigError as `convert` does, or where there is no SLURM; ConvertError where the jobs
    ended without a data set.
    """
    dst, before = Path(dst), _stamp(Path(dst))
    submitted = submit_conversion(source, dst, config)
    if submitted is None:
        return load_manifest(dst)
    plan, jobs = submitted
    if tell is not None:
        tell(shown(plan))
    return _follow(plan, jobs[-1], before, progress) if wait else None


def submit_conversion(source: str, dst: Path, config: ConvertConfig, *,
                      setup: Sequence[str] = ()) -> tuple[Plan, list[Any]] | None:
    """Queue a conversion: its plan and jobs, the finishing one last; None where all is done.

    Args:
        setup: shell lines for the nodes, before the jobs.

    Raises: ConfigError.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm: there is no sbatch here; convert on this machine without it")
    opened, done = opened_for(source, dst, config)
    if done is not None:
        log.info("%s: is complete already; nothing to do", dst)
        return None
    with only_one(dst):
        plan = prepare(opened, source, dst, config)
    jobs = _submit(plan, config, setup)
    log.info("%s: %d shards as SLURM jobs %s, finished by %s; logs in %s", dst,
             len(plan.shards()), jobs[0].job_id, jobs[-1].job_id, job_folder(dst))
    return plan, jobs


def job_folder(dst: Path) -> Path:
    """Logs and pickled calls: beside the data set, not in it, and for the owner alone."""
    return dst.resolve().parent / f".{dst.resolve().name}-convert-jobs"


def private_folder(dst: Path) -> Path:
    """`job_folder`, made. Raises: ConfigError where somebody else has made it before."""
    folder = job_folder(dst)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"DST = {dst}: {folder} belongs to uid {folder.stat().st_uid}; pickles "
                          "are only run for their owner")
    folder.chmod(0o700)
    return folder


def _submit(plan: Plan, config: ConvertConfig, setup: Sequence[str]) -> list[Any]:
    import submitit

    folder = private_folder(plan.dst)
    workers = config.workers or WORKERS
    tasks = min(config.slurm_tasks, len(plan.shards()))
    memory = config.slurm_mem_gb or 0.75 * workers
    common: dict[str, Any] = {"timeout_min": config.slurm_minutes, "slurm_array_parallelism": tasks}
    if setup:
        common["slurm_setup"] = list(setup)
    if config.slurm_partition:
        common["slurm_partition"] = config.slurm_partition
    extra = {"account": config.slurm_account} if config.slurm_account else {}
    array = submitit.AutoExecutor(folder=str(folder), cluster="slurm")
    # srun takes its cores from its own option alone: since SLURM 22.05 not from the job's.
    array.update_parameters(**common, name=f"convert-{plan.dst.name}"[:60], cpus_per_task=workers,
                            slurm_mem=f"{int(memory * 1024)}M", slurm_additional_parameters=extra,
                            slurm_srun_args=[f"--cpus-per-task={workers}"])
    dst = str(plan.dst.resolve())
    jobs = array.map_array(convert_range, [dst] * tasks, range(tasks), [tasks] * tasks,
                           [workers] * tasks)
    last = submitit.AutoExecutor(folder=str(folder), cluster="slurm")
    last.update_parameters(
        **common, name=f"finish-{plan.dst.name}"[:60], cpus_per_task=1, slurm_mem="2048M",
        slurm_additional_parameters=extra | {
            "dependency": f"afterany:{jobs[0].job_id.split('_')[0]}"})
    finishing = last.submit(finish_conversion, dst, name_of(plan.dst, config),
                            config.max_rejected)
    return [*jobs, finishing]


def convert_range(dst: str, part: int, parts: int, workers: int) -> int:
    """One task: its range of the plan's shards. Returns how many shards it is responsible for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with only_one(Path(dst), shared=True, patience_s=STRAGGLERS_S):
        plan = load_plan(Path(dst))
        if plan is None:
            if DatasetPaths(Path(dst)).manifest.exists():
                return 0  # requeued after the end
            raise ConvertError(f"{dst}: has no plan; submit the conversion again")
        shards = plan.shards()
        mine = shards[len(shards) * part // parts:len(shards) * (part + 1) // parts]
        run(plan, workers, progress=True, shards=mine)
    return len(mine)


def finish_conversion(dst: str, name: str, max_rejected: int) -> None:
    """The last job: all records -> manifest."""
    with only_one(Path(dst), patience_s=STRAGGLERS_S):
        plan = load_plan(Path(dst))
        if plan is not None:
            finish(plan, name, max_rejected)


def _stamp(dst: Path) -> int:
    path = DatasetPaths(dst).manifest
    return path.stat().st_mtime_ns if path.exists() else -1


def _follow(plan: Plan, finishing: Any, before: int, progress: bool) -> Manifest:
    waiting = plan.shards()
    gone_since: float | None = None
    total = sum(map(plan.samples, waiting))
    with Ticker(f"convert {plan.dst.name}", total, "images", progress) as ticker:
        while _stamp(plan.dst) == before:
            for shard in list(waiting):
                if read_record(plan, shard) is not None:
                    waiting.remove(shard)
                    ticker.add(plan.samples(shard))
            if finishing.done():
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > LOST_S or finishing.exception() is not None:
                    raise ConvertError(_reason(plan, finishing))
            time.sleep(POLL_S)
    return load_manifest(plan.dst)


def _reason(plan: Plan, finishing: Any) -> str:
    try:
        text = (finishing.stderr() or "").strip().splitlines()
    except Exception:  # submitit raises anything while a log is not there
        text = []
    why = next((line for line in reversed(text) if "Error" in line), "no reason in its log")
    return (f"the jobs ended without a data set: {why}\nLogs: {job_folder(plan.dst)}. Run the same "
            "command again: it does what is missing")
