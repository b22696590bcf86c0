"""The supervisor in bad weather: file systems that fail for a while, nodes that are late."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from launcher.journal.events import read_events, record
from launcher.slurm import scheduler
from launcher.submission.control import _changed
from launcher.submission.submit import prepare
from launcher.supervise import folder, incarnation, supervisor, workers
from launcher.supervise.attempt import Attempt
from launcher.supervise.folder import Folder
from launcher.supervise.here import supervise_here
from launcher.supervise.incarnation import Outcome, Place
from launcher.supervise.supervisor import Supervisor
from launcher.supervise.workers import Pulse
from resnet_dist.run.lease import commit_right, holder
from resnet_dist.run.paths import RunPaths
from resnet_dist.train import CRASHED, NODE, Heart, failure_code
from tests.unit.launcher import stand_in


def lead(run, config, place=None) -> Outcome:
    """A supervisor in this process."""
    return Supervisor(run, config, place or Place("local", "1"),
                      command=[sys.executable, str(stand_in.WORKER), str(run.root)]).run()


def stale(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("what", ["holder", "read_events", "checkpoint_step"])
def test_a_read_that_fails_for_a_second_costs_no_run(tmp_path, monkeypatch, what):
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, faults={
        "1": {"rank": 0, "step": 13, "do": "raise"}})
    plain, began = getattr(folder, what), time.monotonic()
    monkeypatch.setattr(folder, what, lambda run: (
        stale() if 0.2 < time.monotonic() - began < 1.2 else plain(run)))
    assert lead(run, config) == Outcome("finished")
    assert len([e for e in read_events(run) if e["event"] == "attempt"]) == 2


def test_what_the_supervisor_stumbles_over_restarts_and_ends(tmp_path, monkeypatch):
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, max_restarts=1, steps=2000)
    monkeypatch.setattr(folder, "NEWS_S", 0.2)
    monkeypatch.setattr(Folder, "superseded", stale)
    outcome = lead(run, config)
    assert outcome.kind == "failed"
    assert outcome.cause.startswith("supervisor: OSError: [Errno 116] Stale file handle (gave up")


def test_no_news_is_believed_for_a_while_only(tmp_path, monkeypatch):
    run = Folder(RunPaths(tmp_path))
    run.owner = "us"
    assert not run.superseded()
    monkeypatch.setattr(folder, "LOOK_S", 0.0)
    monkeypatch.setattr(folder, "NEWS_S", 0.2)
    monkeypatch.setattr(folder, "holder", stale)
    assert not run.superseded()
    time.sleep(0.3)
    with pytest.raises(OSError, match="Stale"):
        run.superseded()


def full_disk(where) -> None:
    """The file cannot be made any more."""
    where.symlink_to("absent/file")


def test_crashes_are_counted_where_the_disk_takes_no_event(tmp_path):
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, max_restarts=1,
                                    faults={"*": {"rank": 0, "step": 3, "do": "raise"}})
    full_disk(run.jobs)
    outcome = lead(run, config)
    assert outcome.cause.startswith("rank 0: ValueError: no such luck (gave up after 1 restarts")
    run.jobs.unlink()
    record(run, "seen")
    assert [e["attempt"] for e in read_events(run) if e["event"] == "attempt"] == [1, 2]
    assert run.jobs.read_text().count("\n") == len(read_events(run))


def test_a_crash_that_cannot_be_counted_is_not_requeued(tmp_path, monkeypatch):
    run, _ = stand_in.make_run(tmp_path / "run")
    full_disk(run.jobs)
    record(run, "crashed", attempt=1, checkpoint=0)
    monkeypatch.setattr(incarnation, "COUNT_S", 0.1)
    monkeypatch.setattr(incarnation, "requeue", lambda *_: pytest.fail("requeued"))
    outcome = incarnation.requeue_crashed(run, Place("slurm", "7"), "lost", 1)
    assert outcome.kind == "failed"
    assert "cannot be written" in outcome.cause


def test_a_node_that_comes_late_finds_those_that_wait(tmp_path):
    """Four nodes; the last comes after the patience of the second with a silent leader."""
    run, _ = stand_in.make_run(tmp_path / "run", nodes=4, ranks=1, steps=10)
    prepare(run)
    place = {"where": "local", "job": "41", "names": ["127.0.0.1", *["localhost"] * 3]}
    code = ("import json, sys; from launcher.supervise import channel; channel.SILENCE_S = 2; "
            "channel.PING_S = 0.2; from tests.unit.launcher import stand_in; "
            "stand_in.main(sys.argv[1], json.loads(sys.argv[2]))")
    nodes = []
    for node in range(4):
        time.sleep(4 * (node == 3))
        nodes.append(subprocess.Popen([sys.executable, "-c", code, str(run.root), json.dumps(
            {**place, "node": node})], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [json.loads(node.communicate(timeout=60)[0])[0] for node in nodes]
    assert said == ["finished", "followed", "followed", "followed"]


def test_a_gather_that_fails_counts_as_a_crash(tmp_path, monkeypatch):
    run, config = stand_in.make_run(tmp_path / "run", nodes=2, ranks=1, max_restarts=1)
    prepare(run)
    asked = []
    monkeypatch.setattr(supervisor, "GATHER_S", 0.1)
    monkeypatch.setattr(supervisor, "requeue_crashed",
                        lambda *_: asked.append(1) or Outcome("requeued"))
    kinds = [lead(run, config, Place("slurm", "51", restart, 0, ("127.0.0.1", "localhost"))).kind
             for restart in range(3)]
    assert kinds == ["requeued", "failed", "failed"]


def test_a_worker_that_cannot_be_killed_is_a_lost_node(tmp_path, monkeypatch):
    """SIGKILL is kept from it, as from a process in state D."""
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, steps=2000, max_restarts=1, faults={
        "1": {"rank": 0, "step": 5, "do": "hang"}}, hang_s=1)
    monkeypatch.setattr(workers.os, "killpg", lambda *_: None)
    monkeypatch.setattr(workers.Workers, "abort", lambda _: None)
    monkeypatch.setattr(workers, "KILL_S", 0.5)
    monkeypatch.setattr(supervisor, "KILL_S", 0.5 - 5)
    outcome = lead(run, config)
    assert outcome.kind == "failed"
    assert "SIGKILL did not end rank 0" in outcome.cause


def test_a_heartbeat_on_a_full_disk_alarms_and_still_beats(tmp_path, monkeypatch):
    run = RunPaths(tmp_path)
    heart = Heart(run, SimpleNamespace(rank=0))
    heart.beat(1)
    os.utime(run.heartbeat(0), (0, 0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    heart._last = float("-inf")
    heart.beat(2)
    assert run.heartbeat(0).stat().st_mtime > 0


def test_silence_proves_nothing_where_the_file_system_does_not_tell():
    pulse = Pulse(last=1, since=0.0)
    pulse.feel(None, 50.0)
    assert (pulse.since, pulse.beats) == (50.0, 0)


def test_a_broken_gpu_costs_its_node_and_not_three_restarts(tmp_path, monkeypatch):
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, faults={
        "1": {"rank": 0, "step": 13, "do": "broken node"}})
    asked = []
    monkeypatch.setattr(incarnation, "requeue", lambda *_: Outcome("requeued"))
    monkeypatch.setattr(incarnation.scheduler, "exclude", lambda *words: asked.append(words))
    outcome = lead(run, config, Place("slurm", "61", 0, 0, ("n7",)))
    assert outcome.kind == "requeued"
    assert asked == [("61", "n7")]
    (crashed,) = [e for e in read_events(run) if e["event"] == "crashed"]
    assert crashed["cause"].endswith("uncorrectable ECC error (node n7 is at fault)")


def test_a_node_that_fails_outside_slurm_is_restarted(tmp_path):
    run, config = stand_in.make_run(tmp_path / "run", ranks=1, faults={
        "1": {"rank": 0, "step": 13, "do": "broken node"}})
    assert lead(run, config).kind == "finished"


@pytest.mark.parametrize(("said", "broken"), [
    ("CUDA error: uncorrectable ECC error encountered", True),
    ("CUDA error: unspecified launch failure", True),
    ("CUDA error: device = auto: n7 has nvidia0, but torch cannot use them", True),
    ("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", True),
    ("CUDA error: out of memory", False), ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ("CUDA error: device-side assert triggered", False),
    ("CUDA error: an illegal memory access was encountered", False), ("no such luck", False)])
def test_what_counts_as_a_broken_gpu(said, broken):
    assert failure_code(RuntimeError(said), CRASHED) == (NODE if broken else CRASHED)


@pytest.mark.parametrize("queue", [{}, None, {
    "7": scheduler.Queued("RUNNING", "", "n1")}])
def test_a_lock_that_a_file_server_keeps_for_a_dead_node(tmp_path, monkeypatch, queue):
    """The holder's job is unknown to SLURM, SLURM does not answer, or the job runs."""
    run, _ = stand_in.make_run(tmp_path / "run")
    monkeypatch.setattr(incarnation, "HELD_S", 6.0)
    monkeypatch.setattr(scheduler, "queue_states", lambda jobs: queue)
    with incarnation.lease(run, Place("slurm", "7")) as dead:
        if queue != {}:
            with pytest.raises(incarnation.Held, match=r"slurm job 7\.0"):
                with incarnation.lease(run, Place("slurm", "8")):
                    pass
            assert read_events(run)[-1]["event"] == "refused"
            return
        with incarnation.lease(run, Place("slurm", "8")) as mine:
            assert holder(run) == mine
            with pytest.raises(OSError, match="run by slurm job 8"):
                with commit_right(run, dead):
                    pass


def test_a_commit_is_refused_by_the_lock_where_the_lease_is_remembered(tmp_path):
    run = RunPaths(tmp_path)
    with incarnation.lease(run, Place("slurm", "7")) as old:
        remembered = run.lease.read_text()
    with incarnation.lease(run, Place("slurm", "8")):
        run.lease.write_text(remembered)  # as an attribute cache shows it
        with pytest.raises(OSError, match="run by slurm job 8"):
            with commit_right(run, old):
                pass


def test_a_second_train_harms_no_run_that_runs(tmp_path):
    run, _ = stand_in.make_run(tmp_path / "run", ranks=1)
    run.stop_request.touch()
    with incarnation.lease(run, Place("foreground", "1")):
        assert supervise_here(run) == 1
    assert run.stop_request.exists()
    assert [e["event"] for e in read_events(run)] == ["refused"]


def test_the_stopped_rank_is_blamed_whoever_is_polled_first():
    attempt = Attempt(1, 2)
    attempt.note_hang(0, 60.2, False)
    attempt.note_hang(1, 60.1, True)
    attempt.note_hang(0, 61.0, False)
    assert attempt.cause == "rank 1 made no step for 60 s and is stopped (state T)"


def test_a_stopped_worker_is_seen_as_such(tmp_path):
    run, _ = stand_in.make_run(tmp_path / "run", ranks=2)
    each = workers.Workers(run, [sys.executable, "-c", "import time; time.sleep(60)"], node=0,
                           ranks_per_node=2, hang_s=0.1)
    pids = each.start(1, 2, "127.0.0.1", 1)
    os.kill(pids[1], signal.SIGSTOP)
    for pulse in each._pulses.values():
        pulse.since -= 1000
    deadline = time.monotonic() + 20  # the kernel stops it when it gets to it
    while not workers._stopped(pids[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [(rank, stopped) for rank, _, stopped in each.hung()] == [(1, True), (0, False)]
    each.kill()


def test_the_remedy_that_a_divergence_names_is_accepted(tmp_path):
    _, config = stand_in.make_run(tmp_path / "run")
    assert _changed(config, ["divergence.lr_factor=0.5"]).divergence.lr_factor == 0.5
