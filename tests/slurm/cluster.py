"""A real SLURM on this machine, as `slurm/local_cluster.sh` starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "slurm" / "local_cluster.sh"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")


@dataclass(frozen=True)
class Cluster:
    """`slurm/local_cluster.sh` under one prefix."""

    prefix: Path

    def script(self, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **({"PATH": path} if path else {})}
        return subprocess.run(["bash", str(SCRIPT), *words, "--prefix", str(self.prefix)],
                              capture_output=True, text=True, timeout=120, env=environment)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Take it down at the end, however this process ends: even SIGKILL closes the pipe."""
        with tempfile.TemporaryFile("w+") as said:
            guard = subprocess.Popen(
                ["bash", "-c", 'cat; exec bash "$@"', "guard", str(SCRIPT), "down", "--purge",
                 "--prefix", str(self.prefix)],
                stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)
            try:
                yield
            finally:
                guard.communicate(timeout=120)
                said.seek(0)
                assert guard.returncode == 0, said.read()

    def pid(self, daemon: str) -> int:
        return int((self.prefix / "run" / f"{daemon}.pid").read_text().split()[0])

    def processes(self) -> list[str]:
        """Living processes (no zombies) of this cluster's daemons, as "pid name"."""
        mark = f"RESNET_DIST_CLUSTER={self.prefix}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                name, state = (folder / "comm").read_text().strip(), _state(folder)
            except OSError:
                continue
            if state != "Z":
                found.append(f"{folder.name} {name}")
        return found


def _state(folder: Path) -> str:
    return (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]


def why_not() -> str | None:
    """Why no local SLURM can be started here."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if missing:
        return f"{', '.join(missing)} missing: slurm/local_cluster.sh up --install"
    if os.getuid() != 0:
        return "slurmd needs root to start jobs"
    return None
