"""A third of the faults, of every kind; `make faults` makes all 36."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.__main__ import judge
from tests.faults.ground import Ground
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
