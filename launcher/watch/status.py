"""What every run is doing, from its files first and from SLURM second.

`run_status` reads the run directory alone: jobs.jsonl, the ends of metrics.jsonl, heartbeats, the
newest commit record. `statuses` adds what SLURM says, in one call for all runs, and does without
where SLURM does not answer. `show.py` prints it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.journal.events import LAST_WORDS, Event, Process, read_events, redone_steps
from launcher.journal.progress import heartbeat_steps, newest_checkpoint
from launcher.slurm.scheduler import Queued, queue_states
from resnet_dist.run.paths import RunPaths

_TAIL_BYTES = 65_536
_SILENT_S = 120.0
_FORGOTTEN = "FORGOTTEN"  # our own word for a job that neither squeue nor sacct knows
_FAILED_STATES = (_FORGOTTEN, "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
                  "DEADLINE", "PREEMPTED", "COMPLETED")


@dataclass(frozen=True)
class RunStatus:
    """One run. `top1` is in percent, of the last validation; ages and times are in seconds."""

    name: str
    state: str  # pending, running, requeued, finished, failed, stopped
    cause: str = ""
    job: str = ""
    where: str = ""
    nodes: int = 0
    ranks: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    top1: float | None = None
    images_per_s: float | None = None
    eta_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    restarts: int = 0
    redone_steps: int = 0
    logs: str = ""  # folder of SLURM's own logs of the job
    worker_pids: tuple[int, ...] = ()  # of the current attempt on the leading node, by rank
    after: tuple[str, ...] = ()  # jobs that must end well before this run starts
    # Queued behind the run and still to come: job -> protocol. SLURM strikes out those it has lost.
    evaluations: dict[str, str] = dataclasses.field(default_factory=dict)
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False)

    @property
    def over(self) -> bool:
        return self.state in LAST_WORDS

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "events"}


def find_runs(folder: Path) -> list[RunPaths]:
    """The runs in a folder by name; those that are closed to this user are left out."""
    if not folder.is_dir():
        return []
    found = [RunPaths(entry.absolute()) for entry in sorted(folder.iterdir())]
    return [run for run in found if os.access(run.config, os.R_OK)
            and all(os.access(path, os.R_OK) or not path.exists()
                    for path in (run.jobs, run.metrics))]


def run_status(run: RunPaths) -> RunStatus:
    """From files alone."""
    events = read_events(run)
    state, cause = _state(events, time.time())
    facts: dict[str, Any] = {}
    for event in events:  # the newest value of each fact
        facts.update(event)
    attempts = [event for event in events if event["event"] == "attempt"]
    submissions = sum(event["event"] == "submitted" for event in events)
    train, validation = _last_metrics(run)
    checkpoint = newest_checkpoint(run)
    beats = heartbeat_steps(run, attempts[-1]["attempt"] if attempts else 0)
    reached = [train.get("step", 0), *beats, checkpoint.step if checkpoint else 0]
    step, steps = max(reached), facts.get("steps", 0)
    if state == "running" and attempts:
        step = max([*beats, attempts[-1]["step"]])
    rate, nodes = train.get("images_per_s"), facts.get("nodes", 0)
    eta_s = max(0, steps - step) * facts.get("batch_size", 0) / rate \
        if state == "running" and rate else None
    return RunStatus(
        name=run.name, state=state, cause=cause, job=str(facts.get("job", "")),
        where=facts.get("where", ""), nodes=nodes if isinstance(nodes, int) else len(nodes),
        ranks=facts.get("ranks", 0), step=step, steps=steps, loss=train.get("loss"),
        top1=validation.get("top1"), images_per_s=rate, eta_s=eta_s,
        checkpoint_step=checkpoint.step if checkpoint else None,
        checkpoint_age_s=max(0.0, time.time() - checkpoint.state.stat().st_mtime)
        if checkpoint else None,
        restarts=max(0, len(attempts) - submissions), redone_steps=redone_steps(events),
        logs=facts.get("logs", str(run.submitit)),
        worker_pids=tuple(attempts[-1]["pids"]) if state == "running" and attempts else (),
        after=tuple(facts.get("after", ())) if state == "pending" else (),
        evaluations=_open_evaluations(events),
        events=tuple(events))


def _state(events: Sequence[Event], now: float) -> tuple[str, str]:
    """State and cause as the files tell them."""
    state, cause, supervisor, since = "stopped", "never submitted", None, 0.0
    where = ""
    for event in events:
        kind = event["event"]
        where = event.get("where", where)
        if kind == "submitted":
            state, cause, supervisor, since = "pending", "", None, event["time"]
        elif kind == "started":
            state, cause, supervisor = "running", "", Process.of(event)
        elif kind == "attempt":
            state, cause = "running", ""
        elif kind == "crashed":
            cause = f"restarting: {event['cause']}"
        elif kind == "requeued" and event["how"] != "in place":
            state, cause = "requeued", event["why"]
        elif kind in LAST_WORDS:
            state, cause = kind, event.get("cause", "")
        elif kind == "unevaluated":
            cause = f"evaluation {event['protocol']}: {event['why']}"
    if state == "running" and supervisor and supervisor.alive() is False and where != "slurm":
        return "failed", "the supervisor is gone without a word (killed?); `resume` continues"
    if state == "pending" and where == "local" and now - since > _SILENT_S:
        return "failed", "the job never started; see submitit/local.log in the run directory"
    return state, cause


def _open_evaluations(events: Sequence[Event]) -> dict[str, str]:
    """Evaluations that were queued and have not told how they ended: job -> protocol."""
    found: dict[str, str] = {}
    for event in events:
        if event["event"] == "evaluation queued":
            found[event["eval_job"]] = event["protocol"]
        elif event["event"] in ("evaluated", "unevaluated"):
            found = {job: each for job, each in found.items() if each != event["protocol"]}
    return found


def _last_metrics(run: RunPaths) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last training and the last validation line; {} where there is none."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with open(run.metrics, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            # Validations are rare: the end first, then all.
            for span in (min(size, _TAIL_BYTES), size):
                file.seek(size - span)
                lines = file.read().splitlines()
                for kind in {"train", "val"} - set(found):
                    if line := _last(lines, kind):
                        found[kind] = line
                if len(found) == 2:
                    break
    except FileNotFoundError:
        pass
    return found.get("train", {}), found.get("val", {})


def _last(lines: Sequence[bytes], kind: str) -> dict[str, Any]:
    mark = f'"{kind}"'.encode()
    for line in reversed(lines):
        if mark in line:  # hundreds stand between two validations
            try:
                values: dict[str, Any] = json.loads(line)
                if values["kind"] == kind:
                    return values
            except (ValueError, KeyError, TypeError):
                continue  # a torn line, or the rest of one
    return {}


def statuses(runs: Sequence[RunPaths]) -> tuple[list[RunStatus], str]:
    """All runs, newest event first, and a note where SLURM should have been asked in vain."""
    found = [run_status(run) for run in runs]
    asked = {job for status in found for job in _asked_for(status)}
    queue = queue_states(asked)
    note = "" if queue is not None else "SLURM does not answer; this is what the files say"
    if queue is not None:
        # A job that has ended wrote its last words before, but maybe after its files were read.
        found = [run_status(run) if any(_ended(queue, job) for job in _asked_for(status))
                 else status for run, status in zip(runs, found, strict=True)]
        queue |= {status.job: Queued(_FORGOTTEN, "", "") for run, status
                  in zip(runs, found, strict=True) if status.where == "slurm" and status.job
                  and status.job not in queue and not status.over and _silent(run, status)}
        found = [with_queue(status, queue.get(status.job), queue)
                 if status.where == "slurm" else status for status in found]
    found.sort(key=lambda status: status.events[-1]["time"] if status.events else 0, reverse=True)
    return found, note


def _silent(run: RunPaths, status: RunStatus) -> bool:
    """Whether a run of this user has given no sign of life for a while. Of others' jobs, and of
    those of another cluster that shares the folder, SLURM may know nothing while they run."""
    last = max([status.events[-1]["time"],
                *(beat.stat().st_mtime for beat in run.heartbeats.glob("rank_*"))])
    return run.root.stat().st_uid == os.getuid() and time.time() - last > _SILENT_S


def _asked_for(status: RunStatus) -> list[str]:
    """The jobs on which a run's state hangs, where SLURM knows them."""
    if status.where != "slurm":
        return []
    jobs = status.evaluations if status.over else (*status.after, status.job)
    return [job for job in jobs if job]


def _ended(queue: Mapping[str, Queued], job: str) -> bool:
    """Whether nothing more is to be expected of a job; one that SLURM has forgotten, too."""
    state = queue[job].state if job in queue else ""
    return not state or state.startswith("CANCELLED") or state in _FAILED_STATES


def with_queue(status: RunStatus, queued: Queued | None,
               others: Mapping[str, Queued] = MappingProxyType({})) -> RunStatus:
    """Correct what the files say by what SLURM says.

    Args:
        others: jobs before the run and behind it.
    """
    if status.over:
        return _with_evaluations(status, others)
    if queued is None:
        return status
    said, state, cause = queued.state, status.state, status.cause
    if lost := _lost_before(status, others):
        state, cause = "failed", lost
    elif said in ("PENDING", "REQUEUED", "SUSPENDED"):
        state, cause = "pending" if state == "pending" else "requeued", queued.reason
        if cause == "Dependency" and status.after:
            cause = "waits for job " + ", ".join(status.after)
    elif said in ("RUNNING", "CONFIGURING") and state in ("pending", "requeued"):
        state, cause = "running", "starting"
    elif said.startswith("CANCELLED"):
        state, cause = "stopped", "cancelled in SLURM"
    elif said in _FAILED_STATES:
        state, cause = "failed", cause or _last_words(status, said)
    else:
        return status
    return dataclasses.replace(status, state=state, cause=cause, worker_pids=())


def _lost_before(status: RunStatus, others: Mapping[str, Queued]) -> str:
    """Why a run that waits for other jobs can never start, or ""."""
    for job in status.after:
        state = others[job].state if job in others else "COMPLETED"
        if _ended(others, job) and state != "COMPLETED":
            made = [event for event in status.events if job in event.get("conversion", ())]
            what = f"job {job}, which it waited for, ended as {state}"
            return f"conversion: {what}; see {made[-1]['conversion_logs']}" if made else what
    return ""


def _with_evaluations(status: RunStatus, others: Mapping[str, Queued]) -> RunStatus:
    """A run that is over: the evaluations still to come, and what became of those without a word.

    Of a run that did not finish there was nothing to evaluate: its own cause says enough.
    """
    coming, told = {}, [status.cause] if status.cause else []
    for job, protocol in status.evaluations.items():
        queued = others.get(job, Queued("", "", ""))
        if queued.reason == "DependencyNeverSatisfied":  # left in the queue by some clusters
            end = "can never start"
        elif not _ended(others, job):
            coming[job] = protocol
            end = queued.state.lower()
        elif queued.state:
            end = f"ended as {queued.state}"
        else:
            end = "is not known to SLURM and left no result"
        if job in coming or status.state == "finished":
            told.append(f"evaluation {protocol}: job {job} {end}")
    return dataclasses.replace(status, evaluations=coming, cause="; ".join(told))


def _last_words(status: RunStatus, state: str) -> str:
    """What a job that ended without a word in its events has said last, and where it stands."""
    from launcher.supervise.workers import last_error  # imported where something went wrong alone

    said = "SLURM no longer knows the job" if state == _FORGOTTEN else f"SLURM: {state}"
    logs = sorted(Path(status.logs).glob(f"{status.job}_*.err"), key=os.path.getmtime)
    lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    # srun tells after the reason that a task has ended.
    reason = last_error([line for line in lines if ": Exited with exit code" not in line])
    reason = reason or "no word of it, as where launch.setup or launch.modules end the shell"
    return f"{said}: {reason}; see {status.logs}/{status.job}_*.err"
