"""Supervision of a run: start the ranks, watch them, restart them, end them.

One supervisor a node. That of node 0 leads: it announces attempts, collects exits, decides. The
others only run their node's workers for it. With one node there is no socket.

What ends an attempt, and what follows (imports no torch; safetensors and models are the workers'):

    all workers finished             the run is finished
    a worker failed, or hangs        all workers are killed; a new attempt in the same allocation,
                                     unless `max_restarts` in a row brought no new checkpoint
    a node is lost                   the same, in a new allocation
    diverged                         back to an earlier checkpoint, at most `max_rollbacks` in a row
    bad input                        the run failed: another attempt would only repeat it
    a later incarnation runs the run the workers are killed at once, and nothing is recorded
    SIGUSR1, SIGUSR2                 saved, requeued (time limit, warning of a preemption)
    SIGTERM                          saved; requeued where SLURM means that, else stopped
    stop_request in the run folder   saved, stopped
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

from launcher.journal.events import (
    LAST_WORDS,
    Process,
    last_attempt,
    record,
    restarts_without_progress,
)
from launcher.journal.progress import reached
from launcher.slurm import scheduler
from launcher.supervise.attempt import Attempt, Echo
from launcher.supervise.channel import Hub, Message, address_of_leader, free_port
from launcher.supervise.divergence import go_back
from launcher.supervise.folder import Folder
from launcher.supervise.follower import Follower
from launcher.supervise.incarnation import (
    GATHER_S,
    POLL_S,
    Outcome,
    Place,
    Signals,
    decide,
    lease,
    note_crash,
    read_secret,
    requeue,
    requeue_crashed,
)
from launcher.supervise.workers import (
    BAD_INPUT,
    DIVERGED,
    FINISHED,
    KILL_S,
    NODE,
    Exit,
    Workers,
    train_command,
)
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths

log = logging.getLogger(__name__)

BLAME_S = 1.0  # that other nodes have to name the rank for which all wait


class Supervisor:
    """The supervisor of node 0, which decides.

    Args:
        command: what one rank runs; None: the training loop.
        echo: rank 0's output is copied there (the foreground's terminal).
    """

    def __init__(self, run: RunPaths, config: Config, place: Place, *,
                 command: Sequence[str] | None = None, echo: IO[bytes] | None = None) -> None:
        self._run, self._config, self._place = run, config, place
        self._signals = Signals()
        self._workers = Workers(run, command or train_command(run), node=place.node,
                                ranks_per_node=config.launch.ranks_per_node,
                                hang_s=config.launch.hang_s)
        self._hub: Hub | None = None
        self._echo = Echo(run.rank_log(0), echo) if echo else None
        self._folder = Folder(run)

    def run(self) -> Outcome:
        """Run until the incarnation ends. Raises: Held where another one runs the run."""
        with self._signals.installed():
            return self._lead()

    def _lead(self) -> Outcome:
        place = self._place
        try:
            why = self._gather() if len(place.names) > 1 else ""
            with lease(self._run, place) as owner:
                self._workers.owner = self._folder.owner = owner
                if place.where == "foreground":  # the same command again has the same right to it
                    self._run.stop_request.unlink(missing_ok=True)
                    self._record("submitted", where=place.where, nodes=1, steps=self._config.steps,
                                 batch_size=self._config.batch_size)
                self._record("started", job=place.job, restart=place.restart, where=place.where,
                             nodes=list(place.names), steps=self._config.steps,
                             batch_size=self._config.batch_size, **Process.this().facts)
                outcome = self._ungathered(why) if why else self._outcome()
                self._workers.kill()
                if other := self._folder.successor():
                    log.error("%s runs this run now; ended without a word", other)
                    return Outcome("superseded", other)
                if outcome.kind in LAST_WORDS:
                    self._record(outcome.kind, cause=outcome.cause, step=self._folder.step())
                return outcome
        finally:
            self._workers.kill()
            if self._hub:
                self._hub.send({"do": "end"})
                self._hub.close()

    def _gather(self) -> str:
        """Wait for the supervisors of the other nodes; why not all came, or ""."""
        names = self._place.names
        secret = read_secret(self._run)
        self._hub = Hub(address_of_leader(names[0], names[1]), self._place.incarnation, secret,
                        len(names))
        deadline = time.monotonic() + GATHER_S
        while self._hub.missing:
            if time.monotonic() > deadline:
                absent = ", ".join(names[node] for node in self._hub.missing)
                return f"no supervisor on {absent} within {GATHER_S:.0f} s"
            if self._signals.received:
                return ""
            self._hub.accept()
            _, lost = self._hub.receive()  # which also tells those who wait that we are here
            if lost:
                node, reason = lost[0]
                return f"node {names[node]} is gone ({reason})"
        return ""

    def _ungathered(self, why: str) -> Outcome:
        verdict = self._note_crash(last_attempt(self._folder.events()), why)
        return Outcome("failed", verdict) if verdict else self._lost_node(why)

    def _outcome(self) -> Outcome:
        """Of the attempts; what the supervisor itself stumbles over counts as a crash of one."""
        while True:
            try:
                return self._attempts()
            except Exception as error:
                log.exception("the supervisor itself failed")
                why = f"supervisor: {type(error).__name__}: {error}"
                self._workers.kill()
                if self._hub:
                    self._hub.send({"do": "kill"})
                if verdict := self._note_crash(last_attempt(self._folder.events()), why):
                    return Outcome("failed", verdict)
                if self._place.where == "slurm":
                    return self._requeue_crashed(why)
                self._back_off()

    def _attempts(self) -> Outcome:
        while True:
            asked = self._asked_to_stop()
            if asked:  # between attempts there is nothing to save
                return self._after_stop(asked)
            attempt = self._attempt()
            if self._folder.successor():
                return Outcome("superseded")
            if attempt.over and all(exit.code == FINISHED for exit in attempt.exits.values()):
                return Outcome("finished")
            if attempt.stop:
                self._record("unsaved" if attempt.cause else "saved", attempt=attempt.number,
                             step=self._folder.step(), why=attempt.stop, cause=attempt.cause)
                outcome = self._after_stop(attempt.stop)
                if outcome.kind != "again":
                    return outcome
                continue
            if not attempt.cause:  # a signal that reached the workers first, or nobody's
                self._pause(1.0)
                if self._asked_to_stop():
                    continue
                attempt.trouble = "workers saved and left though nobody asked them to"
            if attempt.failure and attempt.failure.code == DIVERGED:
                if verdict := go_back(self._run, self._folder, attempt, self._config.divergence):
                    return Outcome("failed", verdict, DIVERGED)
                continue
            verdict = self._note_crash(attempt.number, attempt.cause)
            if attempt.failure and attempt.failure.code == BAD_INPUT:
                return Outcome("failed", attempt.cause, BAD_INPUT)
            if verdict:
                return Outcome("failed", verdict)
            if attempt.lost or (attempt.bad_node is not None and self._place.where == "slurm"):
                return self._lost_node(attempt.cause, attempt.bad_node)
            log.warning("%s; restarting from step %d", attempt.cause, self._folder.step())
            self._back_off()

    def _note_crash(self, attempt: int, cause: str) -> str:
        return note_crash(self._run, attempt, cause, self._config.launch.max_restarts)

    def _back_off(self) -> None:
        count = restarts_without_progress(self._folder.events())
        self._pause(0.5 * (2 ** min(count - 1, 8) - 1))

    def _attempt(self) -> Attempt:
        """Start all workers and wait until all have ended."""
        place, world = self._place, self._config.world
        events = self._folder.events()
        number = last_attempt(events) + 1
        # Where a pace that was learned too early has ended attempts in vain, `hang_s` alone counts.
        adaptive = (restarts_without_progress(events)
                    < min(2, self._config.launch.max_restarts))
        address = address_of_leader(*place.names[:2]) if len(place.names) > 1 else "127.0.0.1"
        port = free_port(address)
        attempt = Attempt(number, world)
        before = reached(self._run, number - 1)
        self._tell(attempt, {"do": "start", "attempt": number, "address": address, "port": port,
                             "adaptive": adaptive})
        if self._echo:
            self._echo.begin()
        pids = self._workers.start(number, world, address, port, adaptive=adaptive)
        self._record("attempt", attempt=number, step=self._folder.step(), reached=before,
                     ranks=world, address=address, port=port, pids=list(pids.values()))
        kill_at = float("inf")
        while not attempt.over:
            self._collect(attempt)
            if self._echo:
                self._echo.more()
            now = time.monotonic()
            if self._folder.superseded():
                self._workers.kill()
                return attempt
            if attempt.troubled and not attempt.stop:
                if attempt.hang and kill_at == float("inf"):
                    self._hear_blame(attempt)
                    self._tell(attempt, {"do": "abort"})
                    self._workers.abort()
                kill_at = min(kill_at, now + attempt.patience_s)
            if not attempt.stop and not attempt.troubled and (why := self._asked_to_stop()):
                log.warning("%s: asking all ranks to save", why)
                attempt.stop = why
                self._record("signal", attempt=number, why=why)
                self._tell(attempt, {"do": "stop"})
                self._workers.stop()
                kill_at = now + self._save_limit_s(why)
            if self._signals.received.count(signal.SIGINT) > 1:
                kill_at = min(now, kill_at)  # Ctrl-C twice
            if now >= kill_at and not attempt.killed:
                attempt.killed = True
                if not attempt.troubled:
                    attempt.trouble = "not saved in time; killed"
                self._tell(attempt, {"do": "kill"})
                self._take(attempt, self._workers.kill())
            if attempt.killed and time.monotonic() > kill_at + KILL_S + 5:
                missing = sorted(set(range(world)) - set(attempt.exits))
                attempt.lost, attempt.bad_node = True, self._node_of(missing[0])
                attempt.trouble = (f"{attempt.cause}; " if attempt.cause else "") + (
                    "SIGKILL did not end rank " + ", ".join(map(str, missing)))
                break
            time.sleep(POLL_S)
        if self._echo:
            self._echo.more()
        return attempt

    def _collect(self, attempt: Attempt) -> None:
        """Take in what happened on all nodes since the last call."""
        self._take(attempt, self._workers.poll())
        for each in self._hung(attempt):
            attempt.note_hang(*each)
        if not self._hub:
            return
        messages, lost = self._hub.receive()
        for node, body in messages:
            if body["kind"] == "exits":
                self._take(attempt, [Exit(*each) for each in body["exits"]
                                     if body["attempt"] == attempt.number])
            elif body["kind"] == "hung" and body["attempt"] == attempt.number:
                attempt.note_hang(body["rank"], body["silence_s"], body["stopped"])
            elif body["kind"] == "signal":
                log.warning("node %s received %s", self._place.names[node], body["name"])
                self._signals.received.append(signal.Signals[body["name"]])
        self._note_lost(attempt, lost)

    def _hear_blame(self, attempt: Attempt) -> None:
        """Before what hangs is ended: another node may know the rank for which all wait."""
        deadline = time.monotonic() + BLAME_S
        while self._hub and not attempt.stopped and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._collect(attempt)

    def _hung(self, attempt: Attempt) -> list[tuple[int, float, bool]]:
        return [] if attempt.stop or attempt.trouble else self._workers.hung()

    def _take(self, attempt: Attempt, exits: list[Exit]) -> None:
        for exit in exits:
            attempt.exits[exit.rank] = exit
            if exit.failed and not attempt.killed:
                attempt.failures.append(exit)
                if exit.code == NODE:
                    attempt.bad_node = node = self._node_of(exit.rank)
                    exit = replace(exit, reason=f"{exit.reason} (node {self._place.names[node]} "
                                                "is at fault)")
                    attempt.exits[exit.rank] = attempt.failures[-1] = exit
                self._record("exit", attempt=attempt.number, rank=exit.rank, code=exit.code,
                             reason=exit.reason)

    def _note_lost(self, attempt: Attempt, lost: list[tuple[int, str]]) -> None:
        per_node = self._config.launch.ranks_per_node
        for node, reason in lost:
            attempt.lost = True
            attempt.trouble = attempt.trouble or (
                f"node {self._place.names[node]} is gone ({reason})")
            for rank in range(node * per_node, (node + 1) * per_node):
                attempt.exits.setdefault(rank, Exit(rank, -signal.SIGKILL, "its node is gone"))

    def _node_of(self, rank: int) -> int:
        return rank // self._config.launch.ranks_per_node

    def _tell(self, attempt: Attempt, body: Message) -> None:
        if self._hub:
            self._note_lost(attempt, self._hub.send(body))

    def _asked_to_stop(self) -> str:
        """Why the workers should save and leave, or ""."""
        if self._signals.received:
            return self._signals.received[0].name
        return "stop request" if self._folder.stop_requested() else ""

    def _save_limit_s(self, why: str) -> float:
        """How long saving may take: within SLURM's patience, else as long as a step may take."""
        if self._place.where == "slurm" and why != "stop request":
            return 0.8 * self._config.launch.grace_s
        return self._config.launch.hang_s

    def _after_stop(self, why: str) -> Outcome:
        """What a stop that was carried out (or had nothing to save) means."""
        if why == "stop request":
            self._run.stop_request.unlink(missing_ok=True)
            return Outcome("stopped", "stop requested")
        if self._place.where != "slurm":
            if self._signals.final:
                return Outcome("stopped", self._signals.received[0].name)
            self._signals.received.clear()
            self._record("requeued", how="in place", why=why)
            return Outcome("again")
        job = self._place.job
        verdict = "requeue"
        if self._signals.final:
            verdict = decide(scheduler.job_facts(job), self._place.restart, self._signals.warned)
        if verdict == "requeue":
            return self._requeue(why)
        if verdict == "requeued":
            self._record("requeued", how="by SLURM", why=why)
            return Outcome("requeued", why)
        return Outcome("stopped", f"{why} ({verdict})")

    def _lost_node(self, why: str, bad: int | None = None) -> Outcome:
        """The allocation cannot go on; another one may, without the bad node."""
        if self._place.where != "slurm":
            return Outcome("failed", why)
        return self._requeue_crashed(why, "" if bad is None else self._place.names[bad])

    def _requeue_crashed(self, why: str, bad_node: str = "") -> Outcome:
        return requeue_crashed(self._run, self._place, why, self._config.launch.grace_s, bad_node)

    def _requeue(self, why: str) -> Outcome:
        return requeue(self._run, self._place, why, self._config.launch.grace_s)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signals.received:
            time.sleep(POLL_S)

    def _record(self, event: str, **facts: Any) -> None:
        record(self._run, event, **facts)
        log.info("%s %s", event, " ".join(f"{key}={value}" for key, value in facts.items()))


def supervise(run: RunPaths, config: Config, place: Place,
              command: Sequence[str] | None = None) -> Outcome:
    """Be the supervisor of a node until the incarnation ends."""
    kind = Follower if place.node else Supervisor
    return kind(run, config, place, command=command).run()
