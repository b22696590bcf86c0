"""The model of a step on N ranks: fitted, and used to plan."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.bench.plan import Machine, Point, Recipe, SharedCores, fit, plan, stops_scaling

COST = st.floats(1e-6, 1e-2)


@settings(max_examples=30, deadline=None)
@given(COST, COST, st.floats(1e-11, 1e-8), COST)
def test_a_fit_finds_the_costs_that_made_the_points(fixed: float, image: float, byte: float,
                                                    hop: float) -> None:
    true = SharedCores(fixed, image, byte, hop, cores=2, gradient_bytes=10**7)
    seen = [Point(n, images, true.step_s(n, images)) for n in (1, 2, 4)
            for images in (32, 128 // n, 7)]
    found = fit(seen, 2, 10**7)
    for n, images in ((8, 32), (16, 8), (3, 50)):
        assert found.step_s(n, images) == pytest.approx(true.step_s(n, images), rel=1e-3)


def test_a_fit_has_no_negative_costs() -> None:
    found = fit([Point(1, 1, 1.0), Point(1, 2, 0.5), Point(2, 1, 1.2), Point(4, 1, 0.9)], 2, 100)
    assert min(found.fixed_s, found.image_s, found.byte_s, found.hop_s) >= 0


def test_the_published_steps_are_the_model_s_own() -> None:
    machine = Machine()
    for images, rate in ((400, 7006), (50, 4604)):
        assert images / machine.step_s(1, images, 0) == pytest.approx(rate)


@given(st.integers(1, 4096), st.floats(1e3, 1e9))
def test_an_all_reduce_moves_the_gradient_about_twice(ranks: int, size: float) -> None:
    machine = Machine(hop_s=0)
    seconds = machine.all_reduce_s(ranks, size)
    speed = machine.node_bytes_per_s if ranks <= 8 else machine.network_bytes_per_s
    assert seconds == pytest.approx(2 * (ranks - 1) / ranks * size / speed)


def test_a_plan_ends_where_the_batch_does_and_loses_efficiency_on_the_way() -> None:
    machine, recipe = Machine(), Recipe()
    rows = plan(machine, recipe, [2**k for k in range(3, 13)])
    assert [row["gpus"] for row in rows] == [8, 16, 32, 64, 128, 256]  # one image each at the end
    assert all(row["batch_size"] == 256 for row in rows)
    efficiency = [row["efficiency"] for row in rows]
    assert efficiency == sorted(efficiency, reverse=True)
    first = rows[0]
    assert first["hours"] * 3600 == pytest.approx(600_000 * first["step_ms"] / 1e3)
    assert first["images_per_s"] == pytest.approx(256 / first["step_ms"] * 1e3)
    assert first["failures"] == pytest.approx(8 * first["hours"] / machine.gpu_hours_per_failure)
    assert stops_scaling(rows) == 8


def test_with_free_networks_and_no_stragglers_weak_scaling_is_perfect() -> None:
    machine = Machine(hop_s=0, node_bytes_per_s=math.inf, network_bytes_per_s=math.inf, straggle=0)
    rows = plan(machine, Recipe(), [8, 64, 4096], images_a_rank=32)
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 1, 1])
    assert stops_scaling(rows) == 4096


def test_the_command_plans(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("bench", "scaling", "--plan", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["gpus"] for row in json.loads(done.stdout)["weak"]] == [2**k for k in range(3, 13)]
    shown = cli("bench", "scaling", "--plan", env={"COLUMNS": "80"})
    assert "…" not in shown.stdout  # whole columns in a narrow terminal
    assert "stops scaling at 8 GPUs" in shown.stdout
    assert "planned, not measured" in shown.stdout
