"""Status and watch, from files and from what SLURM says."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

from launcher.journal.events import (
    Process,
    read_events,
    record,
)
from launcher.slurm import scheduler
from launcher.slurm.scheduler import Queued
from launcher.watch.show import duration, show_status
from launcher.watch.status import RunStatus, run_status, statuses, with_queue
from resnet_dist.run.paths import RunPaths
from tests.unit.launcher.stand_in import make_run, trained


def test_status_reads_everything_from_files(tmp_path):
    status = run_status(trained(tmp_path / "run"))
    assert (status.state, status.step, status.steps, status.job) == ("running", 120, 1000, "77")
    assert (status.loss, status.top1, status.images_per_s) == (1.9, 51.5, 640.0)
    assert status.eta_s == (1000 - 120) * 64 / 640
    assert status.checkpoint_step == 100
    assert 0 <= status.checkpoint_age_s < 10
    assert status.worker_pids == (11, 12)


def test_slurm_corrects_what_the_files_say(tmp_path):
    status = run_status(trained(tmp_path / "run"))
    waiting = with_queue(status, Queued("PENDING", "Resources", ""))
    assert (waiting.state, waiting.cause) == ("requeued", "Resources")
    assert with_queue(status, Queued("CANCELLED by 0", "", "")).state == "stopped"
    failed = with_queue(status, Queued("OUT_OF_MEMORY", "", ""))
    assert failed.state == "failed"
    assert failed.cause.startswith("SLURM: OUT_OF_MEMORY: no word of it")
    assert failed.cause.endswith(f"see {tmp_path}/run/submitit/77_*.err")
    assert with_queue(status, Queued("RUNNING", "", "n1")) == status


@pytest.mark.parametrize(("said", "reason"), [
    ("ModuleNotFoundError: No module named 'launcher'\nsrun: error: n1: task 0: Exited with exit "
     "code 1\n", "ModuleNotFoundError: No module named 'launcher'"),
    ("srun: error: Unable to create step: Invalid account\n",
     "srun: error: Unable to create step: Invalid account")])
def test_the_reason_of_a_job_without_last_words_is_quoted(tmp_path, said, reason):
    run = trained(tmp_path / "run")
    run.submitit.mkdir()
    (run.submitit / "77_0_log.err").write_text(said)
    told = with_queue(run_status(run), Queued("FAILED", "", "")).cause
    assert told == f"SLURM: FAILED: {reason}; see {run.submitit}/77_*.err"


@pytest.mark.parametrize(("age_s", "owner", "state"), [
    (600, 0, "failed"), (10, 0, "running"), (600, 12345, "running")])
def test_a_job_that_slurm_has_forgotten_is_over_where_the_run_is_silent(
        tmp_path, monkeypatch, age_s, owner, state):
    """Without sacct nobody else says that it died; of others' jobs SLURM tells us nothing."""
    run = trained(tmp_path / "run")
    before = time.time() - age_s
    run.jobs.write_text("".join(json.dumps({**event, "time": before}) + "\n"
                                for event in read_events(run)))
    os.utime(run.heartbeat(0), (before, before))
    if owner and os.getuid() == 0:
        os.chown(run.root, owner, owner)
    monkeypatch.setattr("launcher.watch.status.queue_states", lambda jobs: {})
    (status,), note = statuses([run])
    assert (status.state, note) == (state if os.getuid() == 0 or not owner else "failed", "")
    assert ("SLURM no longer knows the job" in status.cause) == (status.state == "failed")


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_colleagues_closed_run_is_left_out():
    tmp_path = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    tmp_path.chmod(0o755)
    trained(tmp_path / "mine").root.chmod(0o755)
    for name in ("jobs.jsonl", "config.yaml", "metrics.jsonl"):
        (tmp_path / "mine" / name).chmod(0o644)
    trained(tmp_path / "closed")
    trained(tmp_path / "half").root.chmod(0o755)  # its events are 0600
    code = ("import os, sys; from pathlib import Path; "
            "from launcher.submission.costs import _measured; "
            "from launcher.watch.status import find_runs, statuses; "
            "from resnet_dist.config.load import config_from_dict; os.setuid(65534); "
            "runs = Path(sys.argv[1]); print([run.name for run in find_runs(runs)]); "
            "_measured(config_from_dict({'name': 'x', 'runs': str(runs)}))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True)
    shutil.rmtree(tmp_path)
    assert done.stdout == "['mine']\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_every_column_that_was_promised_is_there(tmp_path, monkeypatch):
    """State, nodes, step of total, loss, top-1, images/s, ETA, checkpoint's age, restarts."""
    monkeypatch.setattr(scheduler, "have_slurm", lambda: False)
    run = trained(tmp_path / "run")
    record(run, "crashed", attempt=1, cause="rank 1: ended by SIGKILL", checkpoint=100, reached=120)
    record(run, "attempt", attempt=2, step=100, reached=120, ranks=2, pids=[11, 12])
    run.heartbeat(0).write_text("2 130\n")
    text = io.StringIO()
    show_status(Console(file=text, width=150), None, tmp_path, watch=False, as_json=False)
    head, row = (line.replace("┃", "│").split("│")[1:-1]
                 for line in text.getvalue().splitlines() if "run " in line)
    shown = {name.strip(): cell.strip() for name, cell in zip(head, row, strict=True)}
    age = shown.pop("checkpoint")
    assert shown == {"run": "run", "state": "running", "step": "130 / 1,000", "top-1": "51.50",
                     "restarts": "1", "images/s": "640", "ETA": "1m27s", "loss": "1.900",
                     "nodes": "1 x 2", "job": "77"}
    assert re.fullmatch(r"100, \ds ago", age)


def waiting(root: Path) -> RunStatus:
    """A run whose training job waits for a conversion."""
    run, config = make_run(root)
    record(run, "conversion queued", conversion=["7", "8"], conversion_logs="/logs")
    record(run, "submitted", where="slurm", nodes=1, steps=config.steps, after=["8"])
    record(run, "queued", job="9")
    record(run, "evaluation queued", protocol="1crop", eval_job="10")
    return run_status(run)


@pytest.mark.parametrize(("mine", "before", "state", "cause"), [
    (Queued("PENDING", "Dependency", ""), "RUNNING", "pending", "waits for job 8"),
    (Queued("PENDING", "Dependency", ""), "COMPLETED", "pending", "waits for job 8"),
    (Queued("PENDING", "Priority", ""), "COMPLETED", "pending", "Priority"),
    (Queued("PENDING", "DependencyNeverSatisfied", ""), "FAILED", "failed",
     "conversion: job 8, which it waited for, ended as FAILED; see /logs"),
    (Queued("CANCELLED", "", ""), "TIMEOUT", "failed",
     "conversion: job 8, which it waited for, ended as TIMEOUT; see /logs"),
    (Queued("CANCELLED", "", ""), "COMPLETED", "stopped", "cancelled in SLURM")])
def test_a_chain_says_which_of_its_jobs_failed(tmp_path, mine, before, state, cause):
    told = with_queue(waiting(tmp_path / "run"), mine, {"8": Queued(before, "", "")})
    assert (told.state, told.cause) == (state, cause)


def test_an_evaluation_that_failed_is_told_at_its_run(tmp_path):
    waiting(tmp_path / "run")
    run = RunPaths(tmp_path / "run")
    record(run, "finished", cause="", step=60)
    status = run_status(run)
    assert (status.state, status.cause) == ("finished", "")
    for state, cause in (("RUNNING", "job 10 running"), ("OUT_OF_MEMORY",
                                                         "job 10 ended as OUT_OF_MEMORY")):
        told = with_queue(status, None, {"10": Queued(state, "", "")})
        assert (told.state, told.cause) == ("finished", f"evaluation 1crop: {cause}")
    record(run, "unevaluated", protocol="1crop", why="DataError: shard 3")
    assert run_status(run).cause == "evaluation 1crop: DataError: shard 3"
    record(run, "evaluated", protocol="1crop", top1=97.0)
    assert run_status(run).evaluations == {}


def test_what_a_job_wrote_while_slurm_was_asked_is_not_taken_for_a_failure(tmp_path, monkeypatch):
    """SLURM says COMPLETED of a run whose files were read a moment before its last words."""
    run = trained(tmp_path / "run")

    def ended(jobs, timeout_s=5):
        record(run, "finished", cause="", step=1000)
        return {"77": Queued("COMPLETED", "", "")}

    monkeypatch.setattr("launcher.watch.status.queue_states", ended)
    (status,), _ = statuses([run])
    assert (status.state, status.cause) == ("finished", "")


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Watch a finished run with an evaluation in the queue; `says` is what SLURM says, in turn."""
    waiting(tmp_path / "run")
    run = RunPaths(tmp_path / "run")
    record(run, "finished", cause="", step=60)

    def watch(says, name=None):
        turns = iter(says)
        asked = []

        def queue(jobs, timeout_s=5):
            asked.append(sorted(jobs))
            turn = next(turns)
            return turn() if callable(turn) else turn

        monkeypatch.setattr("launcher.watch.status.queue_states", queue)
        monkeypatch.setattr("launcher.watch.show._REFRESH_S", 0.0)
        text = io.StringIO()
        assert show_status(Console(file=text, width=120), name, tmp_path, watch=True,
                           as_json=False) == 0
        assert next(turns, None) is None, "it ended too early"
        return text.getvalue(), asked

    return run, watch


@pytest.mark.parametrize("name", [None, "run"])
def test_watch_goes_on_until_the_evaluation_behind_the_run_has_told(watched, name):
    run, watch = watched

    def evaluated():
        record(run, "evaluated", protocol="1crop", top1=97.0)
        return {"10": Queued("COMPLETED", "", "")}

    shown, asked = watch([{"10": Queued("PENDING", "Dependency", "")},
                          {"10": Queued("PENDING", "Priority", "")},
                          {"10": Queued("RUNNING", "", "n1")},
                          None,  # the controller is restarted
                          {"10": Queued("COMPLETING", "", "n1")}, evaluated], name)
    assert asked == [["10"]] * 6
    assert "evaluation" not in shown.split("submitted")[0], "told its result, so nothing to add"
    assert "SLURM does not answer" not in shown
    assert ("evaluated" in shown) == (name is not None), "its history is one run's detail"


@pytest.mark.parametrize(("last", "told"), [
    ({"10": Queued("CANCELLED by 0", "", "")}, "job 10 ended as CANCELLED by 0"),
    ({"10": Queued("NODE_FAIL", "", "")}, "job 10 ended as NODE_FAIL"),
    ({"10": Queued("PENDING", "DependencyNeverSatisfied", "")}, "job 10 can never start"),
    ({}, "job 10 is not known to SLURM and left no result")])
def test_watch_never_waits_for_an_evaluation_that_is_lost(watched, last, told):
    _, watch = watched
    shown, _ = watch([{"10": Queued("PENDING", "Priority", "")}, last])
    assert f"run: evaluation 1crop: {told}" in shown


def test_watch_does_not_wait_for_evaluations_while_slurm_is_silent_for_long(watched, monkeypatch):
    _, watch = watched
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr("launcher.watch.show.time", types.SimpleNamespace(
        monotonic=lambda: next(clock), sleep=lambda seconds: None))
    shown, _ = watch([{"10": Queued("PENDING", "Priority", "")}, None, None, None])
    assert "SLURM does not answer" in shown


def test_all_evaluations_of_a_run_are_told(tmp_path):
    waiting(tmp_path / "run")
    run = RunPaths(tmp_path / "run")
    record(run, "evaluation queued", protocol="10crop", eval_job="11")
    record(run, "finished", cause="", step=60)
    told = with_queue(run_status(run), None, {"10": Queued("FAILED", "", ""),
                                              "11": Queued("PENDING", "Priority", "")})
    assert told.evaluations == {"11": "10crop"}
    assert told.cause == ("evaluation 1crop: job 10 ended as FAILED; "
                          "evaluation 10crop: job 11 pending")


def test_a_failed_runs_cause_is_not_burdened_with_its_cancelled_evaluation(tmp_path):
    waiting(tmp_path / "run")
    run = RunPaths(tmp_path / "run")
    record(run, "failed", cause="data.path = x: gone", step=0)
    told = with_queue(run_status(run), None, {"10": Queued("CANCELLED", "", "")})
    assert (told.cause, told.evaluations) == ("data.path = x: gone", {})


def test_five_hundred_runs_in_two_seconds_without_slurm(tmp_path, monkeypatch):
    trained(tmp_path / "run000")
    for number in range(1, 500):
        shutil.copytree(tmp_path / "run000", tmp_path / f"run{number:03d}")
    monkeypatch.setattr(scheduler, "have_slurm", lambda: False)
    text = io.StringIO()
    began = time.process_time()  # other programs of this machine do not count
    assert show_status(Console(file=text, width=120), None, tmp_path, watch=False,
                       as_json=False) == 0
    assert time.process_time() - began < 2
    assert text.getvalue().count("running") == 500
    assert "SLURM does not answer" in text.getvalue()


def test_a_dead_local_supervisor_is_reported_as_a_failure(tmp_path):
    run, config = make_run(tmp_path / "run")
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    process = subprocess.Popen(["sleep", "60"])
    began = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    facts = dataclasses.replace(Process.this(), pid=process.pid, began=began).facts
    record(run, "started", job="1", where="local", nodes=["127.0.0.1"], **facts)
    assert run_status(run).state == "running"
    process.kill()
    process.wait()
    assert run_status(run).state == "failed"
    assert "resume" in run_status(run).cause


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m05s"), (3700, "1h01m"),
                                               (90_000, "1d01h")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_json_is_one_object_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "have_slurm", lambda: False)
    trained(tmp_path / "a")
    trained(tmp_path / "b")
    text = io.StringIO()
    show_status(Console(file=text), None, tmp_path, watch=False, as_json=True)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert sorted(line["name"] for line in lines) == ["a", "b"]
    assert "events" not in lines[0]
