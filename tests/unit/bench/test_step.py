"""The benchmarks themselves: who takes part, what is counted, how a failure reads."""

from __future__ import annotations

import json
import os

import pytest
import torch

from resnet_dist.bench.kernels import REPEATS, milliseconds
from resnet_dist.bench.peer import plain_model
from resnet_dist.bench.rounds import Competitor, CompetitorFailed
from resnet_dist.bench.step import _turn
from resnet_dist.models.build import build_model
from resnet_dist.models.norm import GhostBatchNorm2d


def test_the_peer_is_the_same_network_without_a_line_of_ours() -> None:
    torch.manual_seed(0)
    ours = build_model("resnet18", num_classes=10).eval()
    torch.manual_seed(0)
    peer = plain_model("resnet18", 10).eval()
    assert not any(isinstance(m, GhostBatchNorm2d) for m in peer.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(peer(x), ours(x))


def test_a_competitor_that_fails_says_why() -> None:
    with pytest.raises(CompetitorFailed, match="no such model"):
        Competitor("ours", ["resnet_dist.bench.step", "--serve", "ours", json.dumps(
            {"model": "resnet51", "batch": 4, "bn_batch": 4, "size": 32, "precision": "fp32",
             "threads": 1, "steps": 1})], os.environ)


class Cuda:
    """torch.cuda as far as the benchmarks time with it: writes down what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.calls.append("pause"))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self.calls))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty"))


class Event:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def record(self) -> None:
        self._calls.append("event")

    def synchronize(self) -> None:
        self._calls.append("wait")

    def elapsed_time(self, end: Event) -> float:
        return 64.0


def test_kernels_are_timed_on_the_gpu_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    taken = milliseconds(lambda: cuda.calls.append("work"), torch.device("cuda"))
    assert taken == 64.0 / REPEATS
    assert cuda.calls == ["pause", "event", *["work"] * REPEATS, "event", "wait"]


def test_a_competitor_leaves_the_gpu_s_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    numbers = _turn(lambda: cuda.calls.append("step"), 3, 8, torch.device("cuda"))
    assert cuda.calls == ["step", "wait", "step", "step", "step", "wait", "empty"]
    assert numbers["peak_mb"] == 5


def test_step_and_kernels_give_tables_and_json(cli) -> None:  # type: ignore[no-untyped-def]
    one = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = cli("bench", "kernels", "--batch", "1", "--bn-batch", "1", "--rounds", "1", "--json",
               env=one)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["kernel"] for row in rows} == {
        "batch_norm+relu", "batch_norm+add+relu", "max_pool", "average_pool", "normalize"}
    assert all(row["ms"]["ours"] > 0 and row["of_copy"] > 0 for row in rows)
