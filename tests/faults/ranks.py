"""Faults of processes: killed, stopped, slow, starved of memory, at the wrong time."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import statistics
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.journal.events import read_events
from launcher.supervise.memory import _memory_cgroup
from resnet_dist.run.checkpoint import read_record
from resnet_dist.run.paths import RunPaths
from tests.faults.ground import EVERY, HANG_S, PATIENCE_S, STEPS, Ground, Seen, expect
from tests.unit.run.test_checkpoint_kills import kill_often

DAY_S = 86_400
SLACK = 5  # steps that a run makes while a checkpoint is being written


def killed_rank(ground: Ground) -> Seen:
    whole, draw = ground.undisturbed(), random.Random()
    trial = ground.train(f"killed-{draw.randrange(10**6)}")
    trial.wait_for_step(draw.randint(12, 40))
    at, committed = trial.kill(draw.randrange(2)), trial.checkpoint
    trial.wait(lambda: trial.events("exit"), "the notice")
    notice_s = trial.events("exit")[0]["time"] - at
    recover_s = trial.again(at)
    trial.finished()
    trial.same_as(whole)
    expect(notice_s < 1, f"noticed after {notice_s:.2f} s")
    from_step = trial.events("attempt")[1]["step"]
    expect(from_step >= committed, f"went on from {from_step} though {committed} was committed")
    # A save waits for the one before it: at most one of them is in the making.
    expect(trial.redone <= 2 * EVERY, f"{trial.redone} iterations redone")
    return Seen(f"noticed after {notice_s:.2f} s, restarted, same bits", trial.redone, recover_s,
                notice_s=notice_s)


def killed_while_writing(ground: Ground) -> Seen:
    with tempfile.TemporaryDirectory(dir=ground.folder) as folder:
        reported, torn = kill_often(Path(folder) / "run", 100, seed=random.randrange(10**6))
    expect(torn > 10, f"only {torn} kills hit a write")
    expect(reported > 0, "no save was ever reported")
    return Seen(f"100 kills, {torn} within a write: none unreadable, none of {reported} reported "
                "lost")


def killed_while_gathering(ground: Ground) -> Seen:
    """ZeRO 1: rank 1 dies while the ranks bring their shares of the optimizer together."""
    trial = ground.train("zero", fault="state:1:20", engine="deepspeed", zero_stage=1, steps=30)
    trial.wait(lambda: trial.events("crashed") or trial.over, "the kill")
    at = trial.events("crashed")[0]["time"]
    expect(trial.checkpoint in (0, 10), f"checkpoint {trial.checkpoint} after a kill at 20")
    recover_s = trial.again(at)
    trial.finished()
    return Seen("the checkpoint before it was loaded; nothing incomplete", trial.redone, recover_s)


def stopped_rank(ground: Ground) -> Seen:
    whole, trial = ground.undisturbed(), ground.train("stopped-rank")
    trial.wait_for_step(25)
    at = time.time()
    os.kill(trial.pids()[1], signal.SIGSTOP)
    trial.wait(lambda: trial.events("crashed"), "the notice")
    crashed = trial.events("crashed")[0]
    recover_s = trial.again(at)
    trial.finished()
    trial.same_as(whole)
    notice_s = crashed["time"] - at
    expect(re.match(r"rank \d made no step for", crashed["cause"]), crashed["cause"])
    expect(notice_s < 60, f"noticed after {notice_s:.0f} s")
    for rank in range(2):
        expect("Fatal Python error: Aborted" in trial.run.rank_log(rank).read_text(),
               f"no stack of rank {rank} in its log")
    return Seen(f"noticed after {notice_s:.1f} s (hang_s = {HANG_S:.0f}), both ranks' stacks in "
                "the logs, restarted, same bits", trial.redone, recover_s, notice_s=notice_s)


def pulses(ground: Ground) -> Seen:
    whole, trial = ground.undisturbed(), ground.train("pulses")
    trial.wait_for_step(12)
    for _ in range(2):
        pid = trial.pids()[1]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HANG_S / 2)
        os.kill(pid, signal.SIGCONT)
        step = trial.step
        trial.wait(lambda step=step: trial.step > step or trial.over, "a step")
    trial.finished()
    trial.same_as(whole)
    expect(len(trial.events("attempt")) == 1, "it was killed")
    expect("it will be ended after" in trial.said(), "no warning")
    return Seen(f"2 pauses of {HANG_S / 2:.1f} s: warned, not killed, same bits", trial.redone)


def other_clock(ground: Ground) -> Seen:
    """Rank 0, which names and dates what is written, is a day ahead, and a day behind when it is
    started again; rank 1 and the supervisor have the true time."""
    expect(list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")),
           "not made: libfaketime missing: apt-get install --no-install-recommends libfaketime")
    whole = ground.undisturbed()
    trial = ground.train("clock", fault=f"clock:0:0:1:{DAY_S},kill:1:33:1,clock:0:0:2:-{DAY_S}",
                         checkpoint={"keep_last": STEPS})
    for attempt in (1, 2):
        trial.wait_for_step(12 + 30 * (attempt - 1), attempt)
        faked = ["libfaketime" in Path(f"/proc/{pid}/maps").read_text() for pid in trial.pids()]
        expect(faked == [True, False], f"attempt {attempt}: another clock in ranks 0, 1: {faked}")
        if attempt == 1:
            trial.wait(lambda: trial.events("crashed") or trial.over, "the kill")
            recover_s = trial.again(trial.events("crashed")[0]["time"])
    trial.finished()
    trial.same_as(whole)
    for step, day in ((30, 1), (STEPS, -1)):
        off_s = read_record(trial.run.checkpoint(step))["meta"]["time"] - time.time()
        expect(abs(off_s - day * DAY_S) < PATIENCE_S, f"step {step} was written {off_s:.0f} s off")
    expect(trial.events("attempt")[1]["step"] == 30, "not the newest step was taken")
    return Seen("rank 0 a day ahead, a kill, then a day behind (libfaketime under its process; "
                "rank 1 and supervisor true): newest by step, same bits", trial.redone, recover_s)


def torn_curve(ground: Ground) -> Seen:
    whole, trial = ground.undisturbed(), ground.train("torn-curve", fault="torn:0:30")
    trial.wait(lambda: trial.events("crashed") or trial.over, "the kill")
    recover_s = trial.again(trial.events("crashed")[0]["time"])
    trial.finished()
    trial.same_as(whole)
    board = EventAccumulator(str(trial.run.tensorboard))
    board.Reload()
    steps = [event.step for event in board.Scalars("train/loss")]
    expect(steps == list(range(5, STEPS + 1, 5)), f"TensorBoard has the steps {steps}")
    return Seen("JSONL and TensorBoard hold every step once", trial.redone, recover_s)


def out_of_memory(ground: Ground) -> Seen:
    """A rank takes memory until the kernel ends it."""
    own = _memory_cgroup()
    expect(own is not None, "no memory cgroup")
    assert own is not None
    inner, limit = own / f"faults-{os.getpid()}", 3 << 30
    inner.mkdir()
    try:
        first = inner / "memory.max"
        (first if first.exists() else inner / "memory.limit_in_bytes").write_text(str(limit))
        into = ("sh", "-c", f'echo $$ > {inner}/cgroup.procs && exec "$@"', "sh")
        whole = ground.undisturbed()
        trial = ground.train("memory", fault="hog:1:23", before=into)
        trial.wait(lambda: trial.events("crashed") or trial.over, "the kill")
        crashed = trial.events("crashed")[0]
        recover_s = trial.again(crashed["time"])
        trial.finished()
        trial.same_as(whole)
        expect("rank 1: ended by SIGKILL: out of memory" in crashed["cause"], crashed["cause"])
        return Seen(f'"{crashed["cause"]}", restarted, same bits', trial.redone, recover_s)
    finally:
        for _ in range(50):
            try:
                inner.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def occupied_port(ground: Ground) -> Seen:
    trial = ground.train("port", steps=20)
    trial.wait(lambda: trial.events("attempt"), "the ranks' start")
    started = trial.events("attempt")[0]
    with socket.socket() as thief:
        # Ranks take seconds to get as far as listening.
        thief.bind((started["address"], started["port"]))
        thief.listen()
        trial.wait(lambda: trial.events("crashed") or trial.over, "the notice")
    recover_s = trial.again(trial.events("crashed")[0]["time"])
    trial.finished()
    again = trial.events("attempt")[1]
    expect(again["port"] != started["port"], "the same port again")
    expect(recover_s < 30, f"after {recover_s:.0f} s")
    return Seen("restarted with another port", trial.redone, recover_s)


def twenty_kills(ground: Ground) -> Seen:
    """And then a crash loop, which must end."""
    steps, draw = 300, random.Random()
    whole, trial = ground.undisturbed(steps=steps), ground.train("twenty", steps=steps)
    times, notices = [], []
    for kill in range(20):
        trial.wait_for_step(12 * (kill + 1) + draw.randint(0, 8), kill + 1)
        at = trial.kill(draw.randrange(2))
        times.append(trial.again(at, kill + 1))
        notices.append(next(each["time"] for each in trial.events("exit")
                            if each["attempt"] == kill + 1) - at)
    trial.finished()
    trial.same_as(whole, steps)
    expect(max(notices) < 1, f"noticed after {max(notices):.2f} s")
    expect(trial.redone <= 20 * (EVERY + SLACK), f"{trial.redone} iterations redone")
    wall_s, whole_s = _wall_s(trial.run), _wall_s(whole)
    each_s = (wall_s - whole_s) / 20
    loop = ground.train("loop", fault="kill:0:3:*")
    code = loop.code()
    cause = loop.events()[-1]["cause"]
    expect(code == 1 and "gave up after 3 restarts" in cause, f"exit code {code}, {cause}")
    return Seen(f"same bits after 20 kills, one every {wall_s / 20:.1f} s: {wall_s:.0f} s instead "
                f"of {whole_s:.0f} s, effective {whole_s / wall_s:.0%}; {each_s:.1f} s a kill, so "
                f"{1 - each_s / 3600:.2%} at one an hour; crash loop ended: {cause}", trial.redone,
                statistics.median(times), notice_s=statistics.median(notices))


def _wall_s(run: RunPaths) -> float:
    """From the start of the first ranks to the end."""
    events = read_events(run)
    first = next(event for event in events if event["event"] == "attempt")
    return float(events[-1]["time"] - first["time"])
