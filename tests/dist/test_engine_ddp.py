"""The step on real gloo ranks: resumed, cut into micro-batches, spread over worlds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.run import checkpoint
from resnet_dist.run.checkpoint import EngineState
from resnet_dist.run.paths import RunPaths
from tests.dist.harness import run_ranks
from tests.dist.runs import build, digest, join, make_config, train


def resumed_and_uninterrupted(root: Path, values: dict[str, Any]) -> tuple[str, str]:
    """SHA-256 after 6 steps, resumed at step 3 from disk, and without a break."""
    world = join(make_config(1))
    config = make_config(world.size, **values)
    engine = build(config, world)
    train(engine, 0, 3)
    saved = engine.state()
    run = RunPaths(root)
    if world.rank == 0:
        checkpoint.write(run, 3, saved, {})
    train(engine, 3, 6)
    straight = digest(engine.state())
    state, _ = checkpoint.load(run.checkpoint(3))
    again = build(config, world)
    again.load(state)
    train(again, 3, 6)
    return straight, digest(again.state())


@pytest.mark.parametrize(("world", "values"), [
    (1, {}),
    (2, {"precision": "bf16", "micro_batch": 8}),
    (4, {}),
    (3, {"bn_batch": None, "batch_size": 24, "optimizer": {"name": "adamw"}}),
    (4, {"mode": "exact"}),
], ids=str)
def test_resume_equals_uninterrupted(world: int, values: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(resumed_and_uninterrupted, world, tmp_path, values)
    for straight, resumed in results:
        assert straight == resumed == results[0][0]


# Everything that could depend on the world and must not.
EVERYTHING: dict[str, Any] = {
    "mode": "exact", "precision": "bf16", "augment": {"mixup": 0.2, "cutmix": 1.0},
    "model": {"stochastic_depth": 0.5}, "ema": {"decay": 0.9}, "loss": {"label_smoothing": 0.1},
    "optimizer": {"clip_norm": 1.0, "nesterov": True, "decay": "weights"}}


def exact_digests(saved: EngineState | None, start: int, stop: int) -> tuple[str, EngineState]:
    world = join(make_config(1))
    engine = build(make_config(world.size, **EVERYTHING), world)
    if saved is not None:
        engine.load(saved)
    train(engine, start, stop)
    state = engine.state()
    return digest(state, ranks=False), state


@pytest.fixture(scope="module")
def exact_alone() -> tuple[str, EngineState]:
    return run_ranks(exact_digests, 1, None, 0, 4)[0]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_exact_mode_computes_the_same_bits_at_every_world(
        world: int, exact_alone: tuple[str, EngineState]) -> None:
    for found, _ in run_ranks(exact_digests, world, None, 0, 4):
        assert found == exact_alone[0]


def test_exact_mode_keeps_its_bits_through_changes_of_world(
        exact_alone: tuple[str, EngineState]) -> None:
    state = None
    for world, start, stop in ((4, 0, 2), (1, 2, 3), (2, 3, 4)):
        found, state = run_ranks(exact_digests, world, state, start, stop)[0]
    assert found == exact_alone[0]


def first_gradient(values: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    world = join(make_config(1))
    engine = build(make_config(world.size, **values), world)
    train(engine, 0, 1)
    with engine.eval_model() as model:
        running = torch.cat([b.reshape(-1).float() for b in model.buffers()])
    return engine.gradient_vector(), engine.read_window(), running


def test_first_gradients_agree_between_worlds_modes_and_micro_batches() -> None:
    reference, window, running = run_ranks(first_gradient, 1, {})[0]
    for world, values in ((1, {"micro_batch": 4}), (2, {}), (4, {"micro_batch": 4}),
                          (4, {"mode": "exact"})):
        gradient, its_window, its_running = run_ranks(first_gradient, world, values)[0]
        assert (gradient - reference).norm() / reference.norm() < 1e-5, (world, values)
        assert its_window == pytest.approx(window, rel=1e-5), (world, values)
        torch.testing.assert_close(its_running, running, rtol=1e-5, atol=1e-6)
