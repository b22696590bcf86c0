"""The supervisor on one machine, with real processes and signals and a stand-in worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from launcher.journal.events import Event, read_events, redone_steps
from launcher.submission.submit import prepare
from launcher.supervise.incarnation import Place, lease
from launcher.supervise.workers import Pulse, Workers
from resnet_dist.config.load import load_frozen
from resnet_dist.run.lease import commit_right, holder
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import Rollback, read_rollbacks
from tests.unit.launcher import stand_in


class Supervised:
    """A supervisor process on a run, ended with the test."""

    def __init__(self, run: RunPaths, **place: object) -> None:
        self.run = run
        with open(run.root / "supervisor.log", "ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, stand_in.__file__, str(run.root),
                 json.dumps({"where": "local", "job": "1", **place})],
                stdout=subprocess.PIPE, stderr=said)

    def outcome(self, timeout_s: float = 120) -> list[str]:
        output, _ = self.process.communicate(timeout=timeout_s)
        return json.loads(output) if output else []

    def events(self, kind: str | None = None) -> list[Event]:
        return [e for e in read_events(self.run) if kind is None or e["event"] == kind]

    def wait(self, condition: Callable[[], object], limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, (self.run.root / "supervisor.log").read_text()
            assert time.monotonic() < deadline, self.events()
            time.sleep(0.02)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Until every rank has made it."""
        ranks = load_frozen(self.run.config).world
        self.wait(lambda: sum((attempt, step) <= beat for beat in beats(self.run)) == ranks)

    @property
    def pids(self) -> list[int]:
        return self.events("attempt")[-1]["pids"]


def beats(run: RunPaths) -> list[tuple[int, int]]:
    return [tuple(map(int, path.read_text().split()))  # type: ignore[misc]
            for path in run.heartbeats.glob("rank_*")]


@pytest.fixture
def start() -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def call(run: RunPaths, **place: object) -> Supervised:
        started.append(Supervised(run, **place))
        return started[-1]

    yield call
    for each in started:
        each.process.kill()
        each.process.wait()


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run")
    supervised = start(run)
    supervised.wait_for_step(24)
    os.kill(supervised.pids[1], signal.SIGKILL)
    killed_at = time.time()
    assert supervised.outcome() == ["finished", ""]
    (exit,) = supervised.events("exit")
    assert exit["reason"] == "ended by SIGKILL"
    assert exit["time"] - killed_at < 1, "a dead worker is noticed within a second"
    (crashed,) = supervised.events("crashed")
    assert crashed["cause"] == "rank 1: ended by SIGKILL"
    first, second = supervised.events("attempt")
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert second["step"] >= 20
    assert redone_steps(read_events(run)) == second["reached"] - second["step"]
    assert f"attempt 2 starts at step {second['step']}" in run.rank_log(0).read_text()


def test_the_rank_that_knows_the_cause_is_awaited_when_another_only_lost_it(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", faults={"1": [
        {"rank": 0, "step": 13, "do": "lose peer"}, {"rank": 1, "step": 13, "do": "raise late"}]})
    supervised = start(run)
    assert supervised.outcome() == ["finished", ""]
    assert [exit["rank"] for exit in supervised.events("exit")] == [0, 1]
    (crashed,) = supervised.events("crashed")
    assert crashed["cause"] == "rank 1: ValueError: no such luck"


def test_a_rank_that_lost_a_peer_which_goes_on_does_not_wait_for_ever(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=600, faults={
        "1": {"rank": 0, "step": 13, "do": "lose peer"}})
    supervised = start(run)
    supervised.wait(lambda: supervised.events("crashed"))
    (exit,), (crashed,) = supervised.events("exit"), supervised.events("crashed")
    assert "Connection closed by peer" in crashed["cause"]
    assert crashed["time"] - exit["time"] < 6
    supervised.process.kill()


def test_a_crash_loop_ends_after_three_restarts_with_the_cause(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run",
                               faults={"*": {"rank": 0, "step": 3, "do": "raise"}})
    kind, cause = start(run).outcome()
    assert kind == "failed"
    assert cause.startswith("rank 0: ValueError: no such luck (gave up after 3 restarts")
    assert len([e for e in read_events(run) if e["event"] == "attempt"]) == 4
    assert read_events(run)[-1]["event"] == "failed"


def test_crashes_with_progress_between_them_never_end_a_run(tmp_path, start):
    run, _ = stand_in.make_run(
        tmp_path / "run", steps=70, ranks=1,
        faults={str(n): {"rank": 0, "step": 10 * n + 2, "do": "raise"} for n in range(1, 6)})
    assert start(run).outcome() == ["finished", ""]
    assert len([e for e in read_events(run) if e["event"] == "crashed"]) == 5


def test_what_would_only_happen_again_is_not_restarted(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run",
                               faults={"*": {"rank": 0, "step": 3, "do": "bad input"}})
    assert start(run).outcome() == ["failed", "rank 0: batch_size = 7: must divide"]
    assert len([e for e in read_events(run) if e["event"] == "attempt"]) == 1


def test_a_divergence_goes_back_further_each_time_and_ends_with_what_was_tried(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", ranks=1, max_restarts=0,
                               faults={"*": {"rank": 0, "step": 34, "do": "diverge"}})
    kind, cause = start(run).outcome()
    assert kind == "failed"
    assert cause.startswith("rank 0: step 34: loss is not finite; tried again from step 30, 20, 10 "
                            "on the same course. The run diverges by itself: ")
    assert read_rollbacks(run) == (Rollback(34, 30), Rollback(34, 20), Rollback(34, 10))


def test_divergences_with_progress_between_them_never_end_a_run(tmp_path, start):
    run, _ = stand_in.make_run(
        tmp_path / "run", steps=70, ranks=1, max_restarts=0,
        faults={str(n): {"rank": 0, "step": 10 * n + 2, "do": "diverge"} for n in range(1, 6)})
    assert start(run).outcome() == ["finished", ""]
    assert [r.to for r in read_rollbacks(run)] == [10, 20, 30, 40, 50]


def test_a_memory_kill_is_named(tmp_path, monkeypatch):
    """The kernel's count of such kills is what tells it from any other SIGKILL."""
    kills = iter([3, 3, 4])
    monkeypatch.setattr("launcher.supervise.workers.oom_kills", lambda: next(kills))
    run, _ = stand_in.make_run(tmp_path / "run", ranks=2)
    workers = Workers(run, [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], node=0,
                      ranks_per_node=2, hang_s=1)
    workers.start(1, 2, "127.0.0.1", 1)
    exits = []
    while len(exits) < 2:
        exits += workers.poll()
    assert exits[0].reason == "ended by SIGKILL"
    assert exits[1].reason.startswith("ended by SIGKILL: out of memory")


def test_what_counts_as_a_hang_follows_the_ranks_own_pace():
    pulse = Pulse(last=0, since=0.0)
    assert pulse.limit_s(600, adaptive=True) == 600, "it may still be importing"
    assert pulse.limit_s(5, adaptive=True) > 60
    for beat in range(1, 30):
        pulse.feel(beat, 0.2 * beat)
    assert pulse.limit_s(600, adaptive=True) == 60, "300 times its pace"
    assert pulse.limit_s(20, adaptive=True) == 20
    assert pulse.limit_s(600, adaptive=False) == 600
    pulse.feel(30, pulse.since + 12)  # an evaluation, say
    assert pulse.limit_s(600, adaptive=True) == pytest.approx(120)


def test_a_later_incarnation_takes_the_run_over_from_one_that_slurm_gave_up(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000, ranks=1)
    prepare(run)
    old = start(run, where="slurm", job="7", restart=0)
    old.wait_for_step(15)
    new = start(run, where="slurm", job="7", restart=1)
    assert old.outcome() == ["superseded", holder(run)]
    assert holder(run).startswith(f"slurm job 7.1, pid {new.process.pid} on ")
    new.wait(lambda: len(new.events("attempt")) == 2)
    assert [e["event"] for e in new.events() if e["event"] in ("failed", "stopped")] == []
    new.process.send_signal(signal.SIGKILL)


def test_a_commit_under_a_lease_that_changed_hands_is_refused(tmp_path):
    run = RunPaths(tmp_path)
    with lease(run, Place("slurm", "7", 0)) as mine:
        with commit_right(run, mine):
            pass
        run.lease.write_text("slurm job 7.1, pid 1 on other\n")
        with pytest.raises(OSError, match=r"run by slurm job 7\.1.*not by slurm job 7\.0"):
            with commit_right(run, mine):
                pytest.fail("entered")


def test_workers_that_leave_unasked_cannot_loop_for_ever(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", ranks=1, max_restarts=1,
                               faults={"*": {"rank": 0, "step": 3, "do": "leave"}})
    kind, cause = start(run).outcome()
    assert kind == "failed"
    assert cause.startswith("workers saved and left though nobody asked them to (gave up")


def test_sigusr2_saves_and_continues_without_redoing_a_step(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run")
    supervised = start(run)
    supervised.wait_for_step(13)
    supervised.process.send_signal(signal.SIGUSR2)
    assert supervised.outcome() == ["finished", ""]
    second = supervised.events("attempt")[1]
    assert second["step"] >= 13
    assert supervised.events("requeued")[0]["how"] == "in place"
    assert supervised.events("crashed") == []


def test_sigterm_saves_and_ends(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    supervised = start(run)
    supervised.wait_for_step(13)
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.outcome() == ["stopped", "SIGTERM"]
    assert supervised.events("saved")[0]["step"] >= 13
    assert supervised.events()[-1]["event"] == "stopped"


def test_a_stop_request_saves_and_ends_and_is_used_up(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    supervised = start(run)
    supervised.wait_for_step(13)
    run.stop_request.touch()
    assert supervised.outcome() == ["stopped", "stop requested"]
    assert supervised.events("saved")[0]["step"] >= 13
    assert not run.stop_request.exists()


def test_a_signal_before_the_workers_are_ready_still_saves(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    supervised = start(run)
    supervised.wait(lambda: supervised.events("attempt"))
    supervised.process.send_signal(signal.SIGTERM)  # the workers are still importing
    assert supervised.outcome() == ["stopped", "SIGTERM"]
    assert supervised.events("exit") == [], "the signal killed no worker"


def test_a_hung_rank_is_noticed_and_its_stack_is_in_the_log(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=400, hang_s=4,
                               faults={"1": {"rank": 1, "step": 13, "do": "hang"}})
    supervised = start(run)
    supervised.wait(lambda: len(supervised.events("attempt")) == 2)
    (crashed,) = supervised.events("crashed")
    assert crashed["cause"].startswith("rank 1 made no step for 4 s")
    assert "misbehave" in run.rank_log(1).read_text(), "where it hung"


def test_a_worker_deaf_to_signals_is_killed_in_time(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000, hang_s=4,
                               faults={"1": {"rank": 1, "step": 13, "do": "deaf"}})
    supervised = start(run)
    supervised.wait_for_step(15)
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.outcome() == ["stopped", "SIGTERM"]
    assert "not saved in time" in supervised.events("unsaved")[0]["cause"]


def test_workers_never_outlive_a_killed_supervisor(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    supervised = start(run)
    supervised.wait_for_step(5)
    pids = supervised.pids
    supervised.process.kill()
    supervised.process.wait()
    deadline = time.monotonic() + 2
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_supervisor_is_refused_and_names_the_first(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    first = start(run)
    first.wait_for_step(1)
    second = start(run, job="2")
    assert second.outcome() == []
    said = (run.root / "supervisor.log").read_text()
    assert f"is run by local job 1.0, pid {first.process.pid}" in said
    assert first.process.poll() is None
    assert [e["job"] for e in read_events(run) if e["event"] == "started"] == ["1"]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_foreground_shows_rank_0_and_ctrl_c_or_a_closed_terminal_saves(tmp_path, number):
    run, _ = stand_in.make_run(tmp_path / "run", steps=2000)
    code = ("import sys; from pathlib import Path; "
            "from launcher.supervise import here, supervisor; "
            "from resnet_dist.run.paths import RunPaths; run = RunPaths(Path(sys.argv[1])); "
            "supervisor.train_command = lambda run: [sys.executable, sys.argv[2], str(run.root)]; "
            "sys.exit(here.supervise_here(run))")
    process = subprocess.Popen([sys.executable, "-c", code, str(run.root), str(stand_in.WORKER)],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while max(beats(run), default=(0, 0)) < (1, 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75, "half a model is no success"
    assert "rank 0 of attempt 1 starts at step 0" in said
    assert "rank 1 of attempt 1" not in said
    assert [e["event"] for e in read_events(run)][-2:] == ["saved", "stopped"]


# -- two nodes, both on this machine ---------------------------------------------------------------

def two_nodes(start, run: RunPaths, job: str) -> tuple[Supervised, Supervised]:
    prepare(run)
    place = {"job": job, "names": ["127.0.0.1", "localhost"]}
    return start(run, node=0, **place), start(run, node=1, **place)


def test_a_killed_worker_on_the_second_node_restarts_all(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", nodes=2, ranks=1)
    leader, follower = two_nodes(start, run, "31")
    leader.wait_for_step(15)
    victim = next(p for p in psutil.Process(follower.process.pid).children())
    victim.kill()
    assert leader.outcome() == ["finished", ""]
    assert follower.outcome() == ["followed", ""]
    (crashed,) = leader.events("crashed")
    assert crashed["cause"] == "rank 1: ended by SIGKILL"
    assert [e["ranks"] for e in leader.events("attempt")] == [2, 2]


def test_a_lost_node_ends_the_attempt_everywhere(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", nodes=2, ranks=1, steps=2000)
    leader, follower = two_nodes(start, run, "32")
    leader.wait_for_step(5)
    follower.process.kill()
    kind, cause = leader.outcome()
    assert (kind, cause) == ("failed", "node localhost is gone (connection closed)")


def test_a_lost_leader_takes_the_workers_of_all_nodes_with_it(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", nodes=2, ranks=1, steps=2000)
    leader, follower = two_nodes(start, run, "33")
    leader.wait_for_step(5)
    workers = psutil.Process(follower.process.pid).children()
    leader.process.kill()
    kind, cause = follower.outcome()
    assert kind == "failed"
    assert cause.startswith("node 127.0.0.1 is gone")
    assert not any(alive(worker.pid) for worker in workers)


def test_a_signal_that_only_the_second_node_receives_saves_on_both(tmp_path, start):
    run, _ = stand_in.make_run(tmp_path / "run", nodes=2, ranks=1, steps=2000)
    leader, follower = two_nodes(start, run, "34")
    leader.wait_for_step(5)
    follower.process.send_signal(signal.SIGTERM)
    assert leader.outcome() == ["stopped", "SIGTERM"]
    assert follower.outcome() == ["followed", ""]
    assert leader.events("saved")[0]["step"] >= 5
