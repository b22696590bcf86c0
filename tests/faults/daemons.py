"""Daemons of the local SLURM, killed and brought back just as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster


@dataclass
class Daemon:
    """One daemon: how it was started, and where the cluster's script looks for its pid."""

    pid: int
    words: list[str]
    variables: dict[str, str]
    ports: set[int]
    pid_file: Path
    output: Path

    @staticmethod
    def of(cluster: Cluster, name: str) -> Daemon:
        pid = cluster.pid(name)
        process = psutil.Process(pid)
        return Daemon(pid, process.cmdline(), process.environ(), _listening(pid),
                      cluster.prefix / "run" / f"{name}.pid",
                      cluster.prefix / "log" / f"{name}.out")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while _runs(self.pid):
            assert time.monotonic() < deadline, self.words
            time.sleep(0.01)

    def revive(self) -> None:
        """Start it again, and wait until it listens: slurmctld gives up without its slurmdbd."""
        if _runs(self.pid):
            return
        with open(self.output, "ab") as output:
            process = subprocess.Popen(self.words, env=self.variables, stdout=output,
                                       stderr=output, stdin=subprocess.DEVNULL,
                                       start_new_session=True)
        self.pid = process.pid
        began = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
        self.pid_file.write_text(f"{self.pid} {began}\n")
        deadline = time.monotonic() + 60
        while not self.ports <= _listening(self.pid):
            assert _runs(self.pid), f"it ended: {self.words}"
            assert time.monotonic() < deadline, self.words
            time.sleep(0.05)


def _listening(pid: int) -> set[int]:
    try:
        connections = psutil.Process(pid).net_connections("inet")
    except psutil.NoSuchProcess:
        return set()
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
