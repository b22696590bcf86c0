"""A real SLURM for the tests of this folder: brought up once, taken down at the end.

Skips, with the reason, where Debian's SLURM packages are missing or the user is not root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture
def fresh_cluster() -> Iterator[Cluster]:
    """A prefix with nothing running, and nothing left running afterwards."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    yield cluster
    cluster.script("down", "--purge")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster; SLURM_CONF points to it until the session ends."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    up = cluster.script("up")
    if up.returncode:
        pytest.fail(f"the local SLURM did not start:\n{up.stderr}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.prefix / "etc" / "slurm.conf"))
        yield cluster
    down = cluster.script("down", "--purge")
    assert down.returncode == 0, down.stderr
