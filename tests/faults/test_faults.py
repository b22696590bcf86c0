"""A third of the faults, of every kind; `make faults` makes all 36.

Those that need a cluster are not among them: tests/slurm makes 17 to 22 on a real SLURM.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.__main__ import judge
from tests.faults.ground import Ground, Seen
from tests.faults.sheet import markdown, medians
from tests.faults.table import FAULTS, Fault
from tests.slurm.cluster import Cluster

ALWAYS = (1, 2, 5, 6, 8, 9, 12, 15, 16, 28, 31, 32)
CHOSEN = [fault for fault in FAULTS if fault.number in ALWAYS]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("faults"), _no_cluster)
    yield ground
    ground.close()


def _no_cluster() -> Cluster:
    raise AssertionError("tests/slurm has the cluster's faults; none of these needs it")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: str(fault.number))
def test_fault_leads_to_what_is_expected(fault: Fault, ground: Ground) -> None:
    row = judge(fault, ground)
    assert row["as_expected"], row["seen"]


def test_there_is_a_row_for_each_of_the_36() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 37))


def test_a_fault_that_does_something_else_is_a_difference(ground: Ground) -> None:
    def broken(ground: Ground) -> None:
        raise OSError("not what was expected")

    row = judge(Fault(0, "", "", (broken,)), ground)  # type: ignore[arg-type]
    assert not row["as_expected"]
    assert "not what was expected" in row["seen"]


def test_the_table_has_every_figure_and_a_dash_where_there_is_none(ground: Ground) -> None:
    made = [Fault(number, "it|broke", "goes on", (lambda ground, seen=seen: seen,), "as near")
            for number, seen in ((1, Seen("went on", 3, 4.25, notice_s=0.5)), (8, Seen("ended")),
                                 (26, Seen("went on", 0, 30.0, notice_s=15.0)),
                                 (1, Seen("went on", 1, 6.25, notice_s=0.1)))]
    rows = [judge(fault, ground) for fault in made]
    lines = markdown(rows).splitlines()
    assert lines[2] == r"| 1 | it\|broke | goes on | went on (as near) | 3 | 4.2 |"
    assert lines[3].endswith("| - | - |")
    assert medians(rows) == [
        "median to notice a dead rank: 0.30 s of 2 (0.10 to 0.50)",
        "median to notice a hung rank: 15.00 s of 1 (15.00 to 15.00)",
        "median from the fault to the first step after it, in the same allocation: 6.25 s of 3 "
        "(4.25 to 30.00)"]
    assert lines[-1] == "4 of 4 as expected"
