"""slurm/local_cluster.sh: up, used, down; nothing left behind, whatever happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster


def run(*command: str, **options: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60,
                          **options).stdout  # type: ignore[call-overload]


def test_four_nodes_run_a_job_and_accounting_remembers_it(slurm):
    names = sorted(run("srun", "-N4", "bash", "-c", "echo $SLURMD_NODENAME").split())
    assert names == ["n1", "n2", "n3", "n4"]
    deadline = time.monotonic() + 60
    while "COMPLETED" not in (answer := run("sacct", "-n", "-X", "-o", "State")):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


def test_node_names_resolve_and_every_socket_is_on_the_loopback(slurm):
    assert run("getent", "hosts", "n1", "n4").split()[::2][:1] == ["127.0.0.1"]
    daemons = {int(line.split()[0]) for line in slurm.processes()}
    listening = [c for c in psutil.net_connections("inet")
                 if c.status == psutil.CONN_LISTEN and c.pid in daemons]
    assert len(listening) >= 7
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_up_when_up_changes_nothing(slurm):
    before = slurm.pid("slurmctld")
    assert slurm.script("up").returncode == 0
    assert slurm.pid("slurmctld") == before
    assert slurm.script("status").returncode == 0


def test_down_ends_daemons_and_the_processes_of_running_jobs(fresh_cluster):
    assert fresh_cluster.script("status").returncode == 3
    up = fresh_cluster.script("up")
    assert up.returncode == 0, up.stderr
    environment = {**os.environ, "SLURM_CONF": str(fresh_cluster.prefix / "etc" / "slurm.conf")}
    # A job that ignores SIGTERM, with a grandchild in a session of its own.
    marker = f"sleep 54{fresh_cluster.prefix.stat().st_ino}"
    run("sbatch", "-o", "/dev/null", "--wrap", f"trap '' TERM; setsid {marker} & srun {marker}",
        env=environment)
    wait_until(lambda: len(sleepers(marker)) >= 2)
    down = fresh_cluster.script("down")
    assert down.returncode == 0, down.stderr
    assert fresh_cluster.processes() == []
    assert sleepers(marker) == []
    assert str(fresh_cluster.prefix) not in Path("/etc/hosts").read_text()
    assert fresh_cluster.script("down").returncode == 0, "a second down is harmless"


def test_up_that_fails_half_way_leaves_nothing(fresh_cluster, tmp_path):
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho deliberately broken\nexit 1\n")
    broken.chmod(0o755)
    up = fresh_cluster.script("up", path=f"{tmp_path}:{os.environ['PATH']}")
    assert up.returncode == 1
    assert "deliberately broken" in up.stderr, "the failing daemon's own words are shown"
    assert fresh_cluster.processes() == []
    assert str(fresh_cluster.prefix) not in Path("/etc/hosts").read_text()


def test_a_database_that_fails_once_is_made_again_and_the_reason_is_said(fresh_cluster, tmp_path):
    up = fresh_cluster.script("up", path=failing_database(tmp_path, times=1))
    assert up.returncode == 0, up.stderr
    assert "trying once more" in up.stderr
    assert "deliberately broken" in up.stderr
    assert fresh_cluster.script("status").returncode == 0


def test_a_database_that_fails_twice_ends_up_with_the_reason_and_the_room_left(
        fresh_cluster, tmp_path):
    up = fresh_cluster.script("up", path=failing_database(tmp_path, times=2))
    assert up.returncode == 1
    last = up.stderr[up.stderr.index("failed twice"):]
    assert "deliberately broken" in last, last
    assert "Avail" in last, "the room left on the disk"
    assert "general advice" not in last, last
    assert fresh_cluster.processes() == []


def test_up_recovers_from_a_cluster_that_was_killed(fresh_cluster):
    assert fresh_cluster.script("up").returncode == 0
    for line in fresh_cluster.processes():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert fresh_cluster.script("status").returncode == 3
    up = fresh_cluster.script("up")
    assert up.returncode == 0, up.stderr
    assert fresh_cluster.script("status").returncode == 0


def test_a_cluster_ends_with_the_tests_that_started_it_however_they_end(slurm):
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    code = ("import os, signal, sys; from pathlib import Path; from tests.slurm.cluster import "
            "Cluster\ncluster = Cluster(Path(sys.argv[1]))\nwith cluster.guarded():\n"
            "    assert cluster.script('up').returncode == 0\n"
            "    os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", code, str(cluster.prefix)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: not cluster.prefix.exists(), 60)
    assert cluster.processes() == []
    assert str(cluster.prefix) not in Path("/etc/hosts").read_text()


def test_lines_of_clusters_that_are_gone_leave_the_hosts_file(fresh_cluster, tmp_path):
    hosts = Path("/etc/hosts")
    gone, there = (f"127.0.0.1 n1 # resnet-dist local cluster {folder}"
                   for folder in (tmp_path / "gone", tmp_path))
    with open(hosts, "a") as file:
        file.write(f"{gone}\n{there}\n")
    try:
        assert fresh_cluster.script("up").returncode == 0
        lines = hosts.read_text().splitlines()
        assert gone not in lines
        assert there in lines
        assert any(line.endswith(f" {fresh_cluster.prefix}") for line in lines)
    finally:
        hosts.write_text("".join(f"{line}\n" for line in hosts.read_text().splitlines()
                                 if line not in (gone, there)))


def test_a_recycled_pid_is_never_signalled(fresh_cluster):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (fresh_cluster.prefix / "run").mkdir()
        (fresh_cluster.prefix / "run" / "munged.pid").write_text(f"{bystander.pid} 12345\n")
        assert fresh_cluster.script("down").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def sleepers(marker: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline", "status"])
            if p.info["status"] != psutil.STATUS_ZOMBIE
            and " ".join(p.info["cmdline"] or []).endswith(marker)
            and (p.info["cmdline"] or [""])[0].endswith("sleep")]


def wait_until(condition, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def failing_database(folder: Path, times: int) -> str:
    """A PATH whose mariadb-install-db fails so many times, and then is the real one."""
    shim = folder / "mariadb-install-db"
    shim.write_text(f"""#!/bin/sh
echo >>{folder}/calls
if [ "$(wc -l <{folder}/calls)" -le {times} ]; then
    echo "[ERROR] InnoDB: deliberately broken"
    echo "general advice"
    exit 1
fi
exec {shutil.which("mariadb-install-db")} "$@"
""")
    shim.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_folder_that_others_could_have_prepared_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    done = Cluster(tmp_path).script("up")
    assert done.returncode == 2
    assert "root alone may write to" in done.stderr
    assert list(tmp_path.iterdir()) == []
