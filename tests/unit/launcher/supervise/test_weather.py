"""The supervisor in bad weather: file systems that fail for a while, nodes that are late."""

from __future__ import annotations

import errno
import os
import sys
import time

import pytest

from launcher.journal.events import read_events
from launcher.supervise import folder
from launcher.supervise.folder import Folder
from launcher.supervise.incarnation import Outcome, Place
from launcher.supervise.supervisor import Supervisor
from resnet_dist.run.paths import RunPaths
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
