"""Stop, resume and submit."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.frozen.freeze import freeze_code
from launcher.journal.events import (
    Process,
    read_events,
    record,
)
from launcher.slurm import scheduler
from launcher.slurm.sbatch import sbatch_parameters
from launcher.submission.control import resume, stop
from launcher.submission.submit import prepare, submit
from launcher.watch.status import run_status
from resnet_dist.config.load import config_from_dict, load_frozen
from resnet_dist.config.schema import ConfigError
from tests.unit.launcher.stand_in import make_run, trained


def test_stop_now_never_signals_a_recycled_pid(tmp_path):
    run, config = make_run(tmp_path / "run")
    bystander = subprocess.Popen(["sleep", "60"])
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    facts = dataclasses.replace(Process.this(), pid=bystander.pid, began=1).facts
    record(run, "started", job="1", where="local", nodes=["127.0.0.1"], **facts)
    with pytest.raises(ConfigError, match="nothing to stop"):
        stop(run, now=True)
    assert bystander.poll() is None
    bystander.send_signal(signal.SIGKILL)
    bystander.wait()


@pytest.mark.parametrize(("overrides", "message"), [
    (["seed=3"], "seed = 3: defines the training"),
    (["model=resnet18"], "model.name = resnet18: defines the training"),
    (["stepz=3"], "stepz = 3: defines the training"),
    (["launch.nodez=3"], "launch.nodez = 3: unknown key; did you mean 'nodes'"),
    (["launch.ranks_per_node=7"], "= 7: must divide batch_size"),
    (["steps=50"], "steps = 50: the run has finished step 60"),
    ([], "steps = 60: the run has finished step 60; give it more, e.g. steps=66")])
def test_resume_names_what_cannot_be(tmp_path, overrides, message):
    run, config = make_run(tmp_path / "run")
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(run, "finished", step=60, cause="")
    run.checkpoint(60).root.mkdir()
    run.checkpoint(60).state.write_text("{}")
    before = run.config.read_text()
    with pytest.raises(ConfigError) as refused:
        resume(run, overrides, local=True)
    assert message in str(refused.value)
    assert run.config.read_text() == before


def test_resume_refuses_a_run_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "have_slurm", lambda: False)
    with pytest.raises(ConfigError, match=r"is running as job 77.*stop run"):
        resume(trained(tmp_path / "run"), [], local=True)


def test_the_submission_folder_is_private_and_foreign_ones_are_refused(tmp_path):
    run, _ = make_run(tmp_path / "run")
    run.submitit.mkdir(mode=0o777)
    prepare(run)
    assert run.submitit.stat().st_mode & 0o777 == 0o700
    assert run.secret.stat().st_mode & 0o777 == 0o600
    first = run.secret.read_text()
    prepare(run)
    assert run.secret.read_text() != first
    if os.getuid() == 0:
        os.chown(run.submitit, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to uid 12345"):
            prepare(run)


def test_one_machine_has_one_node(tmp_path):
    run, config = make_run(tmp_path / "run", nodes=2)
    with pytest.raises(ConfigError, match=r"launch.nodes = 2.*set launch.nodes=1"):
        submit(config, run, local=True)


def test_sbatch_gets_cores_gpus_and_grace():
    config = config_from_dict({"name": "x", "device": "cuda", "batch_size": 256, "bn_batch": 32,
                               "launch": {"nodes": 2, "ranks_per_node": 4, "cpus_per_rank": 6,
                                          "grace_s": 90, "setup": ["module load x"]}})
    told = sbatch_parameters(config)
    assert (told["nodes"], told["tasks_per_node"]) == (2, 1)
    assert told["cpus_per_task"] == 24
    assert told["slurm_additional_parameters"]["gpus-per-node"] == "4"
    assert "--cpus-per-task=24" in told["slurm_srun_args"]
    assert told["slurm_signal_delay_s"] == 90
    assert told["slurm_setup"][-1] == "module load x"
    assert told["slurm_additional_parameters"]["requeue"] is True
    whole = sbatch_parameters(config_from_dict({"name": "x", "batch_size": 256}))
    assert whole["slurm_additional_parameters"]["exclusive"] is True


def test_a_local_job_outlives_its_submitter_and_a_bad_one_tells_why(tmp_path):
    """The whole local path with the real job; the data set is missing, so it ends by itself."""
    run, _ = make_run(tmp_path / "run", ranks=1, hang_s=200)
    code = ("import sys; from pathlib import Path; from launcher.submission.submit import submit; "
            "from resnet_dist.config.load import load_frozen; "
            "from resnet_dist.run.paths import RunPaths; "
            "run = RunPaths(Path(sys.argv[1])); submit(load_frozen(run.config), run, local=True)")
    done = subprocess.run([sys.executable, "-c", code, str(run.root)], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 150
    while not (status := run_status(run)).over:
        assert time.monotonic() < deadline, read_events(run)
        time.sleep(0.1)
    assert status.state == "failed"
    assert "data.path" in status.cause
    assert len([e for e in read_events(run) if e["event"] == "attempt"]) == 1
    started = next(e for e in read_events(run) if e["event"] == "started")
    assert os.getsid(0) != started["pid"]
    assert load_frozen(run.config).steps == 60


def test_more_steps_that_raise_the_rate_again_are_asked_about(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(tmp_path / "run", ranks=2)
    text = run.config.read_text().replace("name: milestones", "name: cosine")
    run.config.write_text(text)
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(run, "finished", step=60, cause="")
    run.checkpoint(60).root.mkdir()
    run.checkpoint(60).state.write_text("{}")
    monkeypatch.setattr("launcher.submission.control.submit", lambda *_, **__: "1")
    freeze_code(run)
    with pytest.raises(ConfigError, match=r"steps = 120: schedule.name = cosine has the rate 0.05 "
                                          r"at step 60, where 60 steps have 0; .*--allow schedule"):
        resume(run, ["steps=120"], local=True)
    assert load_frozen(run.config).steps == 60
    assert resume(run, ["steps=120"], local=True, allow=["schedule"]) == "1"
    assert load_frozen(run.config).steps == 120
