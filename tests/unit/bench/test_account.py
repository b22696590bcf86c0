"""Launches, bytes and FLOPs of a step against an independent count of ResNet-50's kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from resnet_dist.bench.account import Rates, by_kind, eager_step

H200 = Rates(4.3e12, 790e12, 0.0)  # what the independent count assumed
COMMON: dict[str, Any] = {"batch": 256, "size": 224, "precision": "bf16"}


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, float]]:
    """In a process of its own: kernels that are interpreted here are not launched there."""
    pytest.importorskip("triton", reason="triton is not installed; the test extra brings it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "resnet_dist.bench.account"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)["steps"]["ours"]
    return found


def test_torch_moves_what_was_counted_by_hand() -> None:
    """By hand, pixels and weights are rounded in one pass; torch takes more, not counted here."""
    pixels = ("sub_", "mul_", "_to_copy")
    found = by_kind((launch for launch in eager_step("resnet50", **COMMON)
                     if launch.name not in pixels), H200)
    assert found["all"]["flops"] == pytest.approx(6.22e12, rel=0.002)
    assert found["all"]["bytes"] == pytest.approx((122.1 - 0.14 - 0.20) * 1e9, rel=0.005)
    assert 256 / found["all"]["s"] == pytest.approx(8136, rel=0.005)
    assert found["convolution"]["launches"] == 3 * 53 - 1  # pixels have no gradient
    assert found["batch_norm"]["launches"] == 4 * 53


def test_ours_moves_less(ours: dict[str, dict[str, float]]) -> None:
    assert ours["convolution"]["bytes"] == pytest.approx(32.1e9, rel=0.005)
    assert ours["all"]["bytes"] < 89e9
    assert ours["gradient_sums"]["launches"] == 1  # of 16: before the max-pool's backward
    assert 1e3 * ours["all"]["s"] < 24.9


def test_bytes_grow_with_the_batch_and_flops_with_the_depth() -> None:
    def of(name: str, batch: int) -> dict[str, float]:
        return by_kind(eager_step(name, batch=batch, size=32, precision="bf16"), H200)["all"]

    assert of("resnet20", 64)["flops"] == pytest.approx(2 * of("resnet20", 32)["flops"])
    assert 1.9 < of("resnet20", 64)["bytes"] / of("resnet20", 32)["bytes"] <= 2
    assert 2.5 < of("resnet56", 32)["flops"] / of("resnet20", 32)["flops"] < 3.5


def test_a_launch_takes_its_bytes_its_arithmetic_or_its_start() -> None:
    found = by_kind(eager_step("resnet20", batch=32, size=32, precision="fp32"),
                    Rates(1e12, 1e12, 1e-3))
    assert found["small"]["s"] == pytest.approx(found["small"]["launches"] * 1e-3)
    assert found["all"]["s"] == pytest.approx(sum(
        row["s"] for kind, row in found.items() if kind != "all"))


def test_the_account_is_a_table_without_a_gpu(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("bench", "step", "--account", "--model", "resnet18", "--batch", "64", "--tb-per-s",
               "3.3", env={"TRITON_INTERPRET": "", "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "3.3 TB/s" in done.stdout
    assert "convolution" in done.stdout
