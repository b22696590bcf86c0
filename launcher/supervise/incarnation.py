"""One incarnation of a job: where it runs, which signals it got, and who may run the run.

An incarnation is what SLURM starts and ends; a requeued job has several. Each has one supervisor a
node, and inside it there may be several attempts, each with fresh worker processes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType

from launcher.journal.events import (
    Process,
    read_events,
    record,
    restarts_without_progress,
    write_events,
)
from launcher.journal.progress import checkpoint_step, reached
from launcher.slurm import scheduler
from launcher.slurm.scheduler import JobFacts
from resnet_dist.run.file_errors import NEWS_S, waited_out
from resnet_dist.run.lease import COMMIT_WAIT_S, holder, locked
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

POLL_S = 0.05
HELD_S = 120.0  # so long is a lock waited for whose holder SLURM cannot tell of
_LIVING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
GATHER_S = 120.0  # nodes of one job start within this time
COUNT_S = 60.0  # a full disk is given this time to take what must be counted
TAKEOVER_S = 10.0  # an incarnation that SLURM has requeued may still be ending


@dataclass(frozen=True)
class Place:
    """Where this supervisor runs."""

    where: str  # "slurm", "local" (submitted, on this machine) or "foreground"
    job: str = ""
    restart: int = 0  # how often SLURM has requeued the job
    node: int = 0
    names: tuple[str, ...] = ("127.0.0.1",)

    @property
    def incarnation(self) -> str:
        return f"{self.job}.{self.restart}"


@dataclass(frozen=True)
class Outcome:
    """How an incarnation ended: "finished", "stopped", "failed", "requeued", "requeue" (SLURM did
    not obey; the exit code must ask for it), or "superseded" (a later one runs the run)."""

    kind: str
    cause: str = ""
    code: int = 1  # where it failed: the exit code of the first worker that did


class Held(RuntimeError):
    """Another job runs the run; the message names it."""


class Signals:
    """Stop signals received so far; the handler only notes them."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @contextmanager
    def installed(self) -> Iterator[Signals]:
        """Replaces submitit's handlers, which know rank 0 alone, ignore SIGTERM, and act inside
        the handler."""
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    @property
    def warned(self) -> bool:
        """Whether one of them asks for a requeue."""
        return any(number in (signal.SIGUSR1, signal.SIGUSR2) for number in self.received)

    @property
    def final(self) -> bool:
        """Whether one of them ends a job, as far as the signal tells."""
        return any(number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                   for number in self.received)


def note_crash(run: RunPaths, attempt: int, cause: str, max_restarts: int, **more: int) -> str:
    """Record why an attempt ended; why the run must give up, or ""."""
    step = waited_out(partial(checkpoint_step, run), NEWS_S)
    record(run, "crashed", attempt=attempt, cause=cause, checkpoint=step,
           reached=reached(run, attempt), **more)
    log.error("attempt %d: %s", attempt, cause)
    count = restarts_without_progress(waited_out(partial(read_events, run), NEWS_S))
    if count <= max_restarts:
        return ""
    return f"{cause} (gave up after {count - 1} restarts without a new checkpoint)"


def requeue(run: RunPaths, place: Place, why: str, grace_s: float) -> Outcome:
    """Ask SLURM for another incarnation, by command or, where it does not obey, by exit code."""
    obeyed = scheduler.requeue(place.job, place.restart, patience_s=0.15 * grace_s)
    record(run, "requeued", how="scontrol requeue" if obeyed else "exit code", why=why)
    return Outcome("requeued" if obeyed else "requeue", why)


def requeue_crashed(run: RunPaths, place: Place, why: str, grace_s: float,
                    bad_node: str = "") -> Outcome:
    """As `requeue`, once the crash is on the disk: the next incarnation has to count it.

    bad_node: the next incarnation shall not get it.
    """
    deadline = time.monotonic() + COUNT_S
    while error := write_events(run):
        if time.monotonic() > deadline:
            return Outcome("failed", f"{why} (and {run.jobs} cannot be written, so that restarts "
                                     f"would not be counted: {error}; free space, then resume)")
        time.sleep(1)
    outcome = requeue(run, place, why, grace_s)
    if bad_node and outcome.kind == "requeued":
        record(run, "excluded", node=bad_node, obeyed=scheduler.exclude(place.job, bad_node))
    return outcome


def decide(facts: JobFacts | None, restart: int, warned: bool) -> str:
    """What a SIGTERM in a SLURM job means: "requeue" (we must), "requeued" (SLURM does), or why
    the job ends for good.

    Measured on 22.05: after `scontrol requeue` and a preemption without grace the job is
    COMPLETING and its restart count has gone up; after `scancel` it is COMPLETING and the count has
    not; within the GraceTime of a preemption it is RUNNING with a PreemptTime, and a job that ends
    now by itself would not be requeued; after `scancel --signal=TERM` it is RUNNING without one.

    Args:
        restart: restart count of this incarnation.
        warned: a signal that asks for a requeue came before.
    """
    if facts is None:
        return "SLURM does not answer; it decides"
    if facts.given_up(restart):
        return "requeued"
    if facts.state == "RUNNING" and (facts.preempted or warned):
        return "requeue"
    if facts.state == "TIMEOUT":
        return "requeue"
    return "ended by scancel or at the time limit" if facts.state != "RUNNING" else "asked to stop"


def read_secret(run: RunPaths) -> bytes:
    return bytes.fromhex(run.secret.read_text())


@contextmanager
def lease(run: RunPaths, place: Place) -> Iterator[str]:
    """Be the only one who runs this run; inside, what the lease says. Raises: Held.

    An earlier incarnation of the same job may still hold it. It is waited for, and then replaced:
    SLURM would not have started this one if it had not given that one up, e.g. because its node's
    slurmd is dead. Likewise a job that SLURM no longer has: a file server may keep a dead node's
    lock. From then on its commits are refused, and it ends as soon as it looks.
    """
    began = time.monotonic()
    handle, gone, ask_at = _try_lease(run), False, began + (TAKEOVER_S if place.restart else 5)
    while handle is None and not gone and time.monotonic() - began < HELD_S:
        if time.monotonic() > ask_at:
            lives = _lives(holder(run), place)
            if lives:
                break
            gone, ask_at = lives is False, time.monotonic() + 10
        time.sleep(0.2)
        handle = _try_lease(run)
    mine = (f"{place.where} job {place.incarnation}, pid {os.getpid()} on {Process.this().host}")
    if handle is None:
        other = holder(run)
        if not gone:
            record(run, "refused", job=place.job, held_by=other)
            raise Held(f"{run.root} is run by {other}; stop that one first, or copy the "
                       "run under another name")
        log.warning("taking the run over from %s, which SLURM has given up", other)
    temporary = run.lease.with_name(f".{run.lease.name}.{os.getpid()}")
    fresh = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        fcntl.flock(fresh, fcntl.LOCK_EX)
        os.write(fresh, f"{mine}\n".encode())
        with locked(run.commit_lock, COMMIT_WAIT_S) as lock:  # no commit is under way
            os.replace(temporary, run.lease)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{mine}\n".encode(), 0)
            os.fsync(lock)
        yield mine
    finally:
        os.close(fresh)
        if handle is not None:
            os.close(handle)


def _try_lease(run: RunPaths) -> int | None:
    """A handle on the lease file, locked; None where another process has it."""
    handle = os.open(run.lease, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    try:
        if os.path.samestat(os.fstat(handle), os.stat(run.lease)):
            return handle
    except FileNotFoundError:
        pass
    os.close(handle)  # it was replaced between the two lines
    return None


def _lives(other: str, place: Place) -> bool | None:
    """Whether whoever a lease names still runs; None where nobody tells.

    What is no SLURM job holds its lock itself: this machine's kernel lets go of a dead one's.
    """
    named = re.match(r"slurm job ([\d_]+)\.(\d+),", other)
    if not named or place.where != "slurm":
        return True
    if named[1] == place.job:
        return int(named[2]) >= place.restart
    states = scheduler.queue_states([named[1]])
    if states is None:
        return None
    return named[1] in states and states[named[1]].state in _LIVING


def log_to_stderr(node: int) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True,
                        format=f"%(asctime)s supervisor {node}: %(message)s")
