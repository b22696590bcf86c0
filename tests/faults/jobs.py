"""Faults of the cluster: requeues, cancellations, limits, preemption, dead daemons."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable

import psutil

from resnet_dist.run.paths import RunPaths
from tests.faults.daemons import Daemon
from tests.faults.ground import EVERY, Ground, Seen, Trial, expect
from tests.faults.ranks import SLACK

REFUSED = re.compile(rf"checkpoint of step {2 * EVERY} NOT saved: OSError: .* is run by slurm job "
                     r"\d+\.1, .* now, and not by slurm job \d+\.0,")
SLOW = "slow:*:0:*:0.15"  # seconds a step more, so that a fault finds the run running


def ask(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    expect(done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def requeued(ground: Ground) -> Seen:
    return _signalled(ground, "requeued", ["scontrol", "requeue"], "by SLURM")


def warned(ground: Ground) -> Seen:
    return _signalled(ground, "warned", ["scancel", "--signal=USR2"], "scontrol requeue")


def _signalled(ground: Ground, name: str, command: list[str], how: str) -> Seen:
    whole, trial = ground.undisturbed(), ground.submit(name, fault=SLOW)
    trial.wait_for_step(13)
    at = time.time()
    ask(*command, trial.job)
    return _goes_on(trial, whole, at, how)


def _goes_on(trial: Trial, whole: RunPaths, at: float, how: str) -> Seen:
    """After a signal with grace: saved, requeued, nothing redone, the same bits."""
    recover_s = trial.again(at)
    start_s = from_allocation(trial)
    trial.finished()
    trial.same_as(whole)
    (saved,) = trial.events("saved")
    expect(trial.events("requeued")[0]["how"] == how, trial.events("requeued"))
    expect(trial.redone == 0, f"{trial.redone} iterations redone")
    expect(trial.events("attempt")[1]["step"] == saved["step"], "not from the very step")
    return Seen(f"saved at step {saved['step']}, {saved['time'] - at:.1f} s after it, requeued "
                f"({how}), same bits", 0, recover_s, start_s=start_s)


def from_allocation(trial: Trial) -> float:
    """Seconds from SLURM's start of the newest incarnation, which it tells in whole seconds, to
    now: the first step has just been made."""
    text = ask("scontrol", "show", "job", "--oneliner", trial.job)
    words = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return time.time() - time.mktime(time.strptime(words["StartTime"], "%Y-%m-%dT%H:%M:%S"))


def cancelled(ground: Ground) -> Seen:
    """`scancel --signal=TERM --full` and plain `scancel`."""
    asked = ground.submit("asked", fault=SLOW)
    plain = ground.submit("cancelled", fault=SLOW)
    for trial in (asked, plain):
        trial.wait_for_step(13)
    reached = asked.step
    ask("scancel", "--signal=TERM", "--full", asked.job)
    ask("scancel", plain.job)
    plain.wait(lambda: plain.over, "the end")
    expect(plain.events()[-1]["event"] == "stopped", plain.events()[-1])
    expect(plain.checkpoint >= 13, f"plain scancel: saved at {plain.checkpoint}")
    for trial in (asked, plain):
        trial.wait(lambda trial=trial: not _queued(trial), "the end")
    expect(len(asked.events("started")) == len(plain.events("started")) == 1, "it was requeued")
    lost = max(0, reached - asked.checkpoint)
    expect(lost <= EVERY + SLACK, f"--full: {lost} iterations are lost")
    return Seen(f"plain: saved at step {plain.checkpoint} and ended for good; --full: ended for "
                f"good, {lost} iterations since the last checkpoint lost", lost)


def _queued(trial: Trial) -> bool:
    return trial.job in ask("squeue", "-h", "-o", "%A").split()


def time_limit(ground: Ground) -> Seen:
    """One minute, warned 20 s before its end; slurmctld looks every 30 s, and warns early."""
    whole = ground.undisturbed()
    trial = ground.submit("limit", fault="slow:*:0:*:0.5",
                          launch={"time_minutes": 1, "grace_s": 20})
    trial.wait(lambda: trial.events("signal") or trial.over, "the warning")
    at = trial.events("signal")[0]["time"]
    recover_s = trial.again(at)
    trial.finished()
    trial.same_as(whole)
    expect(trial.redone == 0, f"{trial.redone} iterations redone")
    times = len(trial.events("requeued"))
    # A warning that comes before the ranks are up finds nothing to save.
    expect(times >= len(trial.events("saved")) > 0, "nothing was saved")
    expect(not trial.events("unsaved"), "not saved before a requeue")
    return Seen(f"warned, saved and requeued {times} times, the limit anew each time, same bits", 0,
                recover_s)


def preempted(ground: Ground) -> Seen:
    """By a partition of higher tier: with 20 s of grace, and with none."""
    whole = ground.undisturbed()
    trials = [ground.submit(f"preempted-{partition}", fault=SLOW, launch={"partition": partition})
              for partition in ("grace", "main")]
    for trial in trials:
        trial.wait_for_step(13)
    at = time.time()
    ask("sbatch", "-p", "high", "-N4", "-c2", "-o", "/dev/null", "--wrap", "true")
    times = [trial.again(at) for trial in trials]
    for trial in trials:
        trial.finished()
        trial.same_as(whole)
    expect(trials[0].redone == 0, f"with grace: {trials[0].redone} iterations redone")
    expect(trials[1].redone <= EVERY + SLACK, f"without: {trials[1].redone} iterations redone")
    return Seen(f"grace: {trials[0].redone} redone; none but KillWait: {trials[1].redone} redone; "
                "same bits", sum(trial.redone for trial in trials), max(times))


def lost_node(ground: Ground) -> Seen:
    """SIGKILL of slurmd, slurmstepd and the ranks of the second node."""
    whole, trial = ground.undisturbed(), ground.submit("lost-node", fault=SLOW)
    trial.wait_for_step(23)
    node = trial.events("started")[0]["nodes"][1]
    slurmd = Daemon.of(ground.cluster, f"slurmd-{node}")
    at = time.time()
    slurmd.kill()
    _kill_all(_processes(trial, node))
    try:
        trial.wait(lambda: trial.events("crashed"), "the notice")
        notice_s = trial.events("crashed")[0]["time"] - at
        recover_s = trial.again(at)
        start_s = from_allocation(trial)
        nodes = trial.events("started")[1]["nodes"]
        expect(node not in nodes, f"again on {nodes}")
        trial.finished()
    finally:
        slurmd.revive()
    trial.same_as(whole)
    expect(notice_s < 3, f"noticed after {notice_s:.1f} s")
    expect(trial.redone <= EVERY + SLACK, f"{trial.redone} iterations redone")
    return Seen(f"noticed after {notice_s:.1f} s, went on on {', '.join(nodes)}, same bits",
                trial.redone, recover_s, start_s=start_s)


def lost_slurmd(ground: Ground) -> Seen:
    """SIGKILL of the slurmd alone, under a job of one node: its ranks live on, unseen by SLURM.

    The old incarnation is frozen as it is about to write its checkpoint, and goes on when the next
    one already trains: the rank first, so that only the lease stands between it and its commit.
    """
    whole = ground.undisturbed(1)
    trial = ground.submit("lost-slurmd", nodes=1,
                          fault=f"slow:*:0:1:0.1,late:0:{2 * EVERY}:1,slow:*:0:2:0.5")
    trial.wait_for_step(12)
    node = trial.events("started")[0]["nodes"][0]
    rank, supervisor = (psutil.Process(pid) for pid in (
        trial.pids()[0], trial.events("started")[0]["pid"]))
    slurmd = Daemon.of(ground.cluster, f"slurmd-{node}")
    at = time.time()
    slurmd.kill()
    try:
        trial.wait(lambda: rank.status() == psutil.STATUS_STOPPED, "the old checkpoint")
        supervisor.suspend()  # or it would end the rank as soon as it sees the other's lease
        trial.wait(lambda: len(trial.events("started")) > 1, "the next incarnation")
        recover_s = trial.again(at)
        expect(trial.checkpoint == EVERY, f"checkpoint {trial.checkpoint}, not {EVERY}")
        rank.resume()
        trial.wait(lambda: REFUSED.search(trial.said()) or trial.checkpoint > EVERY, "the refusal")
        expect(trial.checkpoint == EVERY, f"checkpoint {trial.checkpoint} was not refused")
        left = [path.name for path in trial.run.checkpoints.glob("*") if str(rank.pid) in path.name]
        expect(not left, f"the old incarnation left {left}")
        supervisor.resume()
        trial.wait(lambda: not rank.is_running(), "the end of the old rank")
        trial.finished()
    finally:
        slurmd.revive()
        _kill_all(_processes(trial, node))
    trial.same_as(whole)
    holder = trial.run.lease.read_text()
    expect(f"slurm job {trial.job}.1," in holder, holder)
    expect("runs this run now" in trial.said(), "the old incarnation did not notice")
    expect(not trial.events("exit") + trial.events("crashed"), trial.events()[-5:])
    return Seen(f"the rank lived on; the next incarnation took the lease; the old one's commit of "
                f"step {2 * EVERY} was refused, and it ended; nothing of it is there, same bits",
                trial.redone, recover_s)


def lost_controller(ground: Ground) -> Seen:
    """slurmctld, slurmdbd and the data base are down while a requeue is due."""
    whole, trial = ground.undisturbed(), ground.submit(
        "lost-controller", fault=SLOW, launch={"grace_s": 60})  # 9 s of tries
    trial.wait_for_step(13)
    daemons = [Daemon.of(ground.cluster, name) for name in ("slurmctld", "slurmdbd", "mariadbd")]
    for daemon in daemons:
        daemon.kill()
    try:
        step = trial.step
        trial.wait(lambda: trial.step > step + 5, "steps without a controller")
        at = time.time()
        os.kill(trial.events("started")[-1]["pid"], signal.SIGUSR2)
        trial.wait(lambda: trial.events("saved"), "the save")
        trial.wait(lambda: "did not work; again in" in trial.said(), "a requeue in vain")
    finally:
        for daemon in reversed(daemons):
            daemon.revive()
    recover_s = trial.again(at)
    start_s = from_allocation(trial)
    trial.finished()
    trial.same_as(whole)
    expect("did not work; again in" in trial.said(), "no requeue was tried in vain")
    expect(trial.redone == 0, f"{trial.redone} iterations redone")
    how = trial.events("requeued")[0]["how"]
    return Seen(f"training went on, saved, requeue tried again until it worked ({how}), same bits",
                0, recover_s, start_s=start_s)


def lost_munge(ground: Ground) -> Seen:
    """munged is down for the whole time in which a requeue is tried."""
    whole, trial = ground.undisturbed(), ground.submit(
        "lost-munge", fault=SLOW, launch={"grace_s": 60})  # 9 s of tries
    trial.wait_for_step(13)
    munged = Daemon.of(ground.cluster, "munged")
    munged.kill()
    try:
        at = time.time()
        os.kill(trial.events("started")[-1]["pid"], signal.SIGUSR2)
        trial.wait(lambda: trial.events("requeued") or trial.over, "the end of the tries")
        how = trial.events("requeued")[0]["how"]
    finally:
        munged.revive()
    recover_s = trial.again(at)
    start_s = from_allocation(trial)
    trial.finished()
    trial.same_as(whole)
    expect("did not work; again in" in trial.said(), "no back-off")
    expect(how == "exit code", how)
    expect(trial.redone == 0, f"{trial.redone} iterations redone")
    return Seen("saved, requeue tried with back-off, exit code 77, SLURM requeued, same bits", 0,
                recover_s, start_s=start_s)


def _processes(trial: Trial, node: str) -> list[psutil.Process]:
    """A job's slurmstepd and processes on one node."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if (environment.get("SLURM_JOB_ID"), environment.get("SLURMD_NODENAME")) == (
                    trial.job, node):
                found += [process, *(p for p in process.parents() if p.name() == "slurmstepd")]
        except psutil.Error:
            continue
    return list(dict.fromkeys(found))


def _kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
