"""What the end of a worker and a signal from SLURM mean."""

from __future__ import annotations

import pytest

from launcher.slurm.scheduler import JobFacts
from launcher.supervise.incarnation import decide
from launcher.supervise.workers import last_error


@pytest.mark.parametrize(("lines", "expected"), [
    (["Traceback", "ValueError: bad", "resource_tracker: leaked 3 objects"], "ValueError: bad"),
    (["2026-01-02 03:04:05,678 rank 7: DataError: shard 3", ""], "DataError: shard 3"),
    (["nothing special", ""], "nothing special"), ([], "")])
def test_the_reason_is_the_last_line_that_names_an_error(lines, expected):
    assert last_error(lines) == expected


@pytest.mark.parametrize(("facts", "warned", "verdict"), [
    (JobFacts("COMPLETING", 1, False), False, "requeued"),   # scontrol requeue, preemption
    (JobFacts("COMPLETING", 0, False), False, "ended"),      # plain scancel
    (JobFacts("COMPLETING", 0, False), True, "ended"),       # scancel while saving after USR2
    (JobFacts("RUNNING", 0, True), False, "requeue"),        # GraceTime runs
    (JobFacts("RUNNING", 0, False), False, "asked"),         # scancel --signal=TERM
    (JobFacts("RUNNING", 0, False), True, "requeue"),        # USR2, then TERM
    (None, False, "SLURM does not answer")])
def test_sigterm_means_what_slurm_means_by_it(facts, warned, verdict):
    found = decide(facts, 0, warned)
    assert found == verdict if verdict.startswith("requeue") else found.startswith(verdict)
