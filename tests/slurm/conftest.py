"""A cluster of its own for a test that breaks it; the shared one is `slurm` of the folder above."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture
def fresh_cluster() -> Iterator[Cluster]:
    """A prefix with nothing running, and nothing left running afterwards."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    with cluster.guarded():
        yield cluster
