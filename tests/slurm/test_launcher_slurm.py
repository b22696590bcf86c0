"""Jobs of the launcher on a real SLURM: requeue, preemption, time limit, cancel, lost nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest

from launcher.slurm.scheduler import queue_states
from launcher.submission import campaign
from launcher.submission.control import stop
from launcher.submission.submit import submit
from launcher.watch.status import statuses
from resnet_dist.config.schema import ConfigError
from tests.conftest import ROOT
from tests.slurm.slurm_runs import SlurmRun, stand_in
from tests.slurm.slurm_runs import slurm as ask

RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
PATIENT = {"grace_s": 200}  # 30 s for `scontrol requeue`: a busy machine's controller may need them


@dataclass
class Signalled:
    requeued: SlurmRun
    warned: SlurmRun
    cancelled: SlurmRun
    asked: SlurmRun


@pytest.fixture(scope="module")
def signalled(slurm, tmp_path_factory) -> Signalled:
    """Four jobs side by side, each ended or requeued in its own way."""
    folder = tmp_path_factory.mktemp("signalled")
    jobs = Signalled(SlurmRun(folder / "requeued", nodes=2, ranks=1),
                     SlurmRun(folder / "warned", nodes=2, ranks=1, **PATIENT),
                     SlurmRun(folder / "cancelled", nodes=2, ranks=1, steps=20_000),
                     SlurmRun(folder / "asked", nodes=2, ranks=1, steps=20_000))
    for each in vars(jobs).values():
        each.wait_for_step(15)
    ask("scontrol", "requeue", jobs.requeued.job)
    ask("scancel", "--signal=USR2", jobs.warned.job)
    ask("scancel", jobs.cancelled.job)
    ask("scancel", "--signal=TERM", jobs.asked.job)
    for each in vars(jobs).values():
        each.wait_until_over()
    return jobs


def test_scontrol_requeue_continues_from_the_very_step(signalled):
    run = signalled.requeued
    assert run.events()[-1]["event"] == "finished"
    assert [e["how"] for e in run.events("requeued")] == ["by SLURM"]
    assert [e["restart"] for e in run.events("started")] == [0, 1]
    (saved,) = run.events("saved")
    assert run.events("attempt")[1]["step"] == saved["step"] >= 15
    assert run.states() == ["REQUEUED", "COMPLETED"]


def test_scancel_signal_usr2_continues_from_the_very_step(signalled):
    run = signalled.warned
    assert run.events()[-1]["event"] == "finished"
    assert [e["how"] for e in run.events("requeued")] == ["scontrol requeue"]
    (saved,) = run.events("saved")
    assert run.events("attempt")[1]["step"] == saved["step"] >= 15
    assert run.states() == ["REQUEUED", "COMPLETED"]


@pytest.mark.parametrize("name", ["cancelled", "asked"])
def test_scancel_and_sigterm_save_and_end_for_good(signalled, name):
    run = getattr(signalled, name)
    assert run.events()[-1]["event"] == "stopped"
    (saved,) = run.events("saved")
    assert saved["step"] >= 15
    assert len(run.events("attempt")) == 1
    # srun may count a step that scancel has signalled as failed, however its tasks end.
    assert run.states() in ([["CANCELLED"]] if name == "cancelled" else [["COMPLETED"], ["FAILED"]])
    assert run.job not in ask("squeue", "-h", "-o", "%A").split()


def test_pickles_logs_and_secret_are_the_owners_alone(signalled):
    folder = signalled.requeued.run.submitit
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.glob("*.pkl")} == {0}
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600


def test_tasks_of_an_array_are_requeued_one_by_one(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "TrainJob", stand_in.StandInJob)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = [stand_in.make_run(tmp_path / f"task{number}", ranks=1, steps=300, cpus_per_rank=1,
                              **PATIENT) for number in range(2)]
    order = campaign.Order(RECIPE, sweep=("seed=0,1",))
    jobs = campaign._queue(order, [config for _, config in made], [run for run, _ in made], "s", ())
    tasks = [SlurmRun.of(run, job) for (run, _), job in zip(made, jobs, strict=True)]
    assert [task.job.partition("_")[2] for task in tasks] == ["0", "1"]
    for task in tasks:
        task.wait_for_step(15)
    ask("scontrol", "requeue", tasks[0].job)
    ask("scancel", "--signal=USR2", tasks[1].job)
    for task, how in zip(tasks, ("by SLURM", "scontrol requeue"), strict=True):
        task.wait_until_over()
        assert task.events()[-1]["event"] == "finished"
        assert [event["how"] for event in task.events("requeued")] == [how]
        assert [event["job"] for event in task.events("started")] == [task.job] * 2
        (saved,) = task.events("saved")
        assert task.events("attempt")[1]["step"] == saved["step"] >= 15


def test_preempted_jobs_save_and_continue(slurm, tmp_path):
    """Without grace the signal comes with the requeue; with grace, 20 s before."""
    runs = [SlurmRun(tmp_path / partition, nodes=2, ranks=1, steps=500, partition=partition,
                     **PATIENT) for partition in ("main", "grace")]
    for run in runs:
        run.wait_for_step(15)
    ask("sbatch", "-p", "high", "-N4", "-c2", "-o", "/dev/null", "--wrap", "true")
    for run, how in zip(runs, ("by SLURM", "scontrol requeue"), strict=True):
        run.wait_until_over()
        assert run.events()[-1]["event"] == "finished"
        assert [e["how"] for e in run.events("requeued")] == [how]
        (saved,) = run.events("saved")
        assert run.events("attempt")[1]["step"] == saved["step"] >= 15


def test_a_requeue_is_known_to_have_worked_though_the_controller_was_late(slurm, tmp_path):
    """Its first command is given up before the controller obeys it; SLURM refuses the second."""
    run = SlurmRun(tmp_path / "late", nodes=1, ranks=1, steps=200)  # 3.6 s a try
    run.wait_for_step(15)
    with paused(slurm.pid("slurmctld")):
        os.kill(run.events("started")[0]["pid"], signal.SIGUSR2)
        run.wait(lambda: "timed out" in run.said())
    run.wait_until_over()
    assert [e["how"] for e in run.events("requeued")] == ["scontrol requeue"]
    assert run.states() == ["REQUEUED", "COMPLETED"]


@contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_time_limit_is_met_by_a_save_and_a_requeue(slurm, tmp_path):
    run = SlurmRun(tmp_path / "limit", nodes=1, ranks=2, steps=2000, time_minutes=1, grace_s=50)
    run.wait_until_over(200)
    assert run.events()[-1]["event"] == "finished"
    assert run.events("signal")[0]["why"] == "SIGUSR2"
    assert run.events("attempt")[1]["step"] == run.events("saved")[0]["step"] > 0
    assert run.states()[0] == "REQUEUED"


def test_a_crash_loop_ends_the_job_with_its_cause(slurm, tmp_path):
    run = SlurmRun(tmp_path / "loop", nodes=2, ranks=1, max_restarts=1,
                   faults={"*": {"rank": 0, "step": 3, "do": "raise"}})
    run.wait_until_over()
    assert run.events()[-1]["cause"].startswith("rank 0: ValueError: no such luck (gave up")
    assert run.states() == ["FAILED"]


def test_pending_has_slurms_reason_and_can_be_stopped(slurm, tmp_path):
    ask("sbatch", "--parsable", "-N4", "-c2", "-o", "/dev/null", "-J", "hog", "--wrap", "sleep 60")
    run = SlurmRun(tmp_path / "waiting", nodes=4, ranks=2)
    run.wait(lambda: statuses([run.run])[0][0].cause in ("Resources", "Priority"))
    (status,), note = statuses([run.run])
    assert (status.state, status.job, note) == ("pending", run.job, "")
    assert "cancelled" in stop(run.run, now=False)
    assert statuses([run.run])[0][0].state == "stopped"
    assert run.states() == ["CANCELLED"]
    ask("scancel", "--name=hog")


def test_slurms_refusal_is_the_users_message(slurm, tmp_path):
    run, config = stand_in.make_run(tmp_path / "refused", partition="nowhere")
    with pytest.raises(ConfigError, match=r"launch.*Invalid partition.*sinfo"):
        submit(config, run)


def test_an_unreachable_slurm_leaves_what_the_files_say(signalled, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "nothing"))
    assert queue_states(["1"]) is None
    (status,), _ = statuses([signalled.requeued.run])
    assert status.state == "finished"


def test_a_node_that_dies_is_replaced_by_another(fresh_cluster, tmp_path, monkeypatch):
    assert fresh_cluster.script("up").returncode == 0
    monkeypatch.setenv("SLURM_CONF", str(fresh_cluster.prefix / "etc" / "slurm.conf"))
    run = SlurmRun(tmp_path / "lost", nodes=2, ranks=1, steps=300)
    run.wait_for_step(30)
    assert run.events("started")[0]["nodes"] == ["n1", "n2"]
    for pid in processes_of_node(run.job, "n2", fresh_cluster):
        os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    run.wait_until_over()
    assert run.events()[-1]["event"] == "finished"
    (crashed,) = run.events("crashed")
    assert crashed["cause"].startswith("node n2 is gone")
    assert crashed["time"] - killed_at < 3
    assert "n2" not in run.events("started")[1]["nodes"]
    assert run.redone <= 10 + 5, "no more than the steps since the last checkpoint, and the notice"


def test_a_killed_leading_supervisor_is_replaced_by_a_requeue(slurm, tmp_path):
    run = SlurmRun(tmp_path / "headless", nodes=2, ranks=1, steps=300)
    run.wait_for_step(30)
    os.kill(run.events("started")[0]["pid"], signal.SIGKILL)
    run.wait_until_over()
    assert run.events()[-1]["event"] == "finished"
    assert run.events("crashed")[0]["cause"].startswith("node n")
    assert len(run.events("started")) == 2
    assert run.redone <= 10 + 5


def processes_of_node(job: str, node: str, cluster) -> list[int]:
    """slurmd of a node, its slurmstepd, and the job's processes on it."""
    found = [cluster.pid(f"slurmd-{node}")]
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            tasks = environment.get("SLURM_JOB_ID") == job and \
                environment.get("SLURMD_NODENAME") == node
            if tasks:
                found += [process.pid, *(p.pid for p in process.parents()
                                         if p.name() == "slurmstepd")]
        except psutil.Error:
            continue
    return list(dict.fromkeys(found))

