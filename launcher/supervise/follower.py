"""The supervisor of every node but the first: it runs its node's workers for the leader."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.journal.events import LAST_WORDS, last_attempt, read_events, record
from launcher.journal.progress import checkpoint_step
from launcher.slurm import scheduler
from launcher.supervise.channel import Lost, Wire, connect
from launcher.supervise.incarnation import (
    GATHER_S,
    POLL_S,
    Outcome,
    Place,
    Signals,
    note_crash,
    read_secret,
    requeue_crashed,
)
from launcher.supervise.workers import Exit, Workers, train_command
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths


class Follower:
    """Starts, signals and ends workers as the leader orders, and tells it how they end.

    Args:
        command: what one rank runs; None: the training loop.
    """

    def __init__(self, run: RunPaths, config: Config, place: Place, *,
                 command: Sequence[str] | None = None) -> None:
        self._run, self._config, self._place = run, config, place
        self._signals = Signals()
        self._workers = Workers(run, command or train_command(run), node=place.node,
                                ranks_per_node=config.launch.ranks_per_node,
                                hang_s=config.launch.hang_s)

    def run(self) -> Outcome:
        with self._signals.installed():
            return self._follow()

    def _follow(self) -> Outcome:
        place = self._place
        host = place.names[0]
        try:
            wire = connect(host, place.incarnation, read_secret(self._run), place.node, GATHER_S)
        except Lost as reason:
            return self._lost_leader(str(reason))
        try:
            self._serve(wire)
        except Lost as reason:
            return self._lost_leader(f"node {host} is gone ({reason})")
        finally:
            self._workers.kill()
            wire.close()
        return Outcome("followed")

    def _serve(self, wire: Wire) -> None:
        """Carry out the leader's orders until it says "end". Raises: Lost."""
        number, told, hung_told = 0, 0, False
        while True:
            for order in wire.receive():
                match order["do"]:
                    case "start":
                        number, hung_told = order["attempt"], False
                        self._workers.start(number, self._config.world, order["address"],
                                            order["port"], adaptive=order["adaptive"])
                    case "stop":
                        self._workers.stop()
                    case "abort":
                        self._workers.abort()
                    case "kill":
                        self._report(wire, number, self._workers.kill())
                    case "end":
                        return
            self._report(wire, number, self._workers.poll())
            for received in self._signals.received[told:]:
                told += 1
                wire.send({"kind": "signal", "name": received.name})
            if not hung_told and (hung := self._workers.hung()):
                hung_told = True
                wire.send({"kind": "hung", "attempt": number, "rank": hung[0][0],
                           "silence_s": hung[0][1], "stopped": hung[0][2]})
            time.sleep(POLL_S)

    def _report(self, wire: Wire, attempt: int, exits: list[Exit]) -> None:
        if exits:
            wire.send({"kind": "exits", "attempt": attempt,
                       "exits": [[exit.rank, exit.code, exit.reason] for exit in exits]})

    def _lost_leader(self, why: str) -> Outcome:
        """Without a leader node 1 asks for a new allocation, unless SLURM acts already."""
        self._workers.kill()
        if self._place.node != 1 or self._place.where != "slurm":
            return Outcome("failed", why)
        time.sleep(2)
        facts = scheduler.job_facts(self._place.job)
        events = read_events(self._run)
        ended = events and events[-1]["event"] in (*LAST_WORDS, "requeued")
        if self._signals.final or ended or (facts and (
                facts.state != "RUNNING" or facts.restarts > self._place.restart)):
            return Outcome("failed", why)
        if verdict := note_crash(self._run, last_attempt(events), why,
                                 self._config.launch.max_restarts):
            record(self._run, "failed", cause=verdict, step=checkpoint_step(self._run))
            return Outcome("failed", verdict)
        return requeue_crashed(self._run, self._place, why, self._config.launch.grace_s)
