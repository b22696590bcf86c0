"""jobs.jsonl: what it counts, and what its writers and readers survive."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from launcher.journal.events import (
    Process,
    last_attempt,
    read_events,
    record,
    redone_steps,
    restarts_without_progress,
)
from tests.unit.launcher.stand_in import make_run


def crash(checkpoint: int) -> dict:
    return {"event": "crashed", "checkpoint": checkpoint}


@given(st.lists(st.integers(0, 5), max_size=12))
def test_restarts_are_counted_since_the_last_new_checkpoint(steps):
    """Against the definition: the longest tail of crashes without a step above all before it."""
    events = [crash(step) for step in steps]
    expected, newest = 0, -1
    for step in steps:
        expected = 1 if step > newest else expected + 1
        newest = max(newest, step)
    assert restarts_without_progress(events) == expected
    assert restarts_without_progress([*events, {"event": "submitted"}]) == 0


def test_redone_steps_are_those_beyond_the_checkpoint():
    events = [{"event": "attempt", "step": 0, "reached": 0},
              {"event": "attempt", "step": 40, "reached": 78},
              {"event": "attempt", "step": 90, "reached": 90},
              {"event": "attempt", "step": 90, "reached": 95}]
    assert redone_steps(events) == 38 + 0 + 5


def test_a_torn_line_harms_neither_reader_nor_the_next_writer(tmp_path):
    run, _ = make_run(tmp_path / "run")
    record(run, "attempt", attempt=1)
    with open(run.jobs, "a") as file:
        file.write('{"event": "atte')
    assert last_attempt(read_events(run)) == 1
    record(run, "attempt", attempt=2)
    assert [event["attempt"] for event in read_events(run)] == [1, 2]
    assert run.jobs.stat().st_mode & 0o777 == 0o600


def test_many_writers_never_mix_their_lines(tmp_path):
    run, _ = make_run(tmp_path / "run")
    code = ("import sys; from pathlib import Path; from launcher.journal.events import record; "
            "from resnet_dist.run.paths import RunPaths\n"
            "for n in range(50): record(RunPaths(Path(sys.argv[1])), 'x', n=n, pad='y' * 3000)")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(run.root)]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = [line for line in run.jobs.read_text().splitlines() if line]
    assert len(read_events(run)) == len(lines) == 150


def test_a_process_is_never_taken_for_another_with_its_pid():
    this = Process.this()
    assert this.alive() is True
    assert dataclasses.replace(this, began=this.began - 1).alive() is False
    assert dataclasses.replace(this, boot="another").alive() is False
    assert dataclasses.replace(this, host="elsewhere").alive() is None
    child = subprocess.Popen(["true"])
    time.sleep(0.2)  # now a zombie
    began = int(Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert dataclasses.replace(this, pid=child.pid, began=began).alive() is False
    child.wait()
