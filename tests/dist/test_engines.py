"""Both engines, the same promises: DistributedDataParallel and DeepSpeed at ZeRO 0, 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.run import checkpoint
from resnet_dist.run.checkpoint import EngineState
from resnet_dist.run.paths import RunPaths
from tests.dist.harness import run_ranks
from tests.dist.runs import (
    after_an_overflow,
    build,
    digest,
    join,
    make_config,
    momentum,
    train,
)

ENGINES: list[dict[str, Any]] = [{"engine": "ddp"}] + [
    {"engine": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2)]
IDS = ["ddp", "zero0", "zero1", "zero2"]


def resumed_and_uninterrupted(root: Path, values: dict[str, Any]) -> tuple[str, str]:
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
    again = build(config, world)
    again.load(checkpoint.load(run.checkpoint(3))[0])
    train(again, 3, 6)
    return straight, digest(again.state())


@pytest.mark.parametrize("values", [
    pytest.param(values, id=name, marks=[pytest.mark.slow] if name == "zero0" else [])
    for values, name in zip(ENGINES, IDS, strict=True)] + [
    pytest.param({**values, "precision": "fp16"}, id=f"{name} fp16", marks=pytest.mark.slow)
    for values, name in zip(ENGINES, IDS, strict=True)])
def test_resume_equals_uninterrupted(values: dict[str, Any], tmp_path: Path) -> None:
    values = {"precision": "bf16", **values, "micro_batch": 8, "optimizer": {"decay": "weights"},
              "ema": {"decay": 0.9}}
    results = run_ranks(resumed_and_uninterrupted, 2, tmp_path, values)
    for straight, resumed in results:
        assert straight == resumed == results[0][0]


@pytest.mark.parametrize("values", [ENGINES[0], ENGINES[2]], ids=["ddp", "zero1"])
def test_fp16_skips_an_overflow_on_every_rank_and_halves_the_scale(values: dict[str, Any]) -> None:
    for before, after, scale in run_ranks(after_an_overflow, 2, {**values, "precision": "fp16"}):
        assert torch.equal(before, after)
        assert scale == 2.0 ** 119


def step_without_a_launcher(values: dict[str, Any]) -> dict[str, float]:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                "MASTER_PORT"):
        os.environ.pop(key)
    config = make_config(1, **values)
    engine = build(config, join(config))
    train(engine, 0, 1)
    return engine.read_window()


def test_deepspeed_runs_in_the_foreground_without_a_launcher() -> None:
    window, = run_ranks(step_without_a_launcher, 1, ENGINES[2])
    assert window["loss"] > 0


def one_step(values: dict[str, Any]) -> tuple[EngineState, dict[str, float]]:
    """State and norms; without decay the momentum after it is the gradient."""
    world = join(make_config(1))
    engine = build(make_config(world.size, **values, optimizer={"weight_decay": 0.0},
                               log={"every_steps": 1}), world)
    train(engine, 0, 1)
    return engine.state(), engine.norms()


def test_first_gradients_of_all_engines_agree() -> None:
    (first, _), *others = steps = [run_ranks(one_step, 2, values)[0] for values in ENGINES]
    for state, norms in steps:
        assert norms["gradient_norm"] == pytest.approx(
            float(momentum(state).double().norm()), rel=1e-5)
        weights = torch.cat([value.reshape(-1) for name, value in state.model.items()
                             if not name.endswith(("running_mean", "running_var", "tracked"))])
        assert norms["parameter_norm"] == pytest.approx(
            float(weights.double().norm()), rel=1e-5)
    for state, _ in others:
        difference = (momentum(state) - momentum(first)).norm()
        assert difference / momentum(first).norm() < 1e-5
        torch.testing.assert_close(state.optimizer["window"], first.optimizer["window"])


@pytest.mark.parametrize("values", [
    pytest.param(ENGINES[0], id="ddp"),
    pytest.param(ENGINES[2], id="zero1", marks=pytest.mark.slow)])
def test_gradients_that_travel_in_bf16_are_rounded_and_no_worse(values: dict[str, Any]) -> None:
    whole, rounded = (momentum(run_ranks(one_step, 2, {**values, "gradient_dtype": dtype})[0][0])
                      for dtype in ("fp32", "bf16"))
    assert 0 < (rounded - whole).norm() / whole.norm() < 2 ** -7


TWO_GROUPS = {"optimizer": {"decay": "weights"}, "ema": {"decay": 0.9}}


def two_states(values: dict[str, Any]) -> tuple[EngineState, EngineState]:
    world = join(make_config(1))
    engine = build(make_config(world.size, **values), world)
    train(engine, 0, 2)
    saved = engine.state()
    train(engine, 2, 3)
    return saved, engine.state()


@pytest.fixture(scope="module")
def saved_by() -> dict[str, tuple[EngineState, EngineState]]:
    """States after two and three steps, of either engine."""
    return {name: run_ranks(two_states, 2, {**ENGINES[index], **TWO_GROUPS})[0]
            for name, index in (("ddp", 0), ("zero2", 3))}


@pytest.mark.parametrize(("writer", "reader", "world"), [
    pytest.param("ddp", 1, 2, id="ddp to zero0 at 2", marks=pytest.mark.slow),
    pytest.param("ddp", 2, 1, id="ddp to zero1 at 1"),
    pytest.param("ddp", 3, 4, id="ddp to zero2 at 4"),
    pytest.param("zero2", 0, 4, id="zero2 to ddp at 4"),
    pytest.param("zero2", 2, 1, id="zero2 to zero1 at 1", marks=pytest.mark.slow)])
def test_each_engine_resumes_the_others_checkpoints_at_any_world(
        saved_by: dict[str, tuple[EngineState, EngineState]], writer: str, reader: int,
        world: int) -> None:
    """What is loaded is what was saved, to the bit; and the next step is the writer's."""
    saved, expected = saved_by[writer]
    again, after = run_ranks(load_and_step, world, saved, {**ENGINES[reader], **TWO_GROUPS})[0]
    assert digest(again, ranks=False) == digest(saved, ranks=False)
    difference = (momentum(after) - momentum(expected)).norm()
    assert difference / momentum(expected).norm() < 1e-5


def load_and_step(saved: EngineState, values: dict[str, Any]) -> tuple[EngineState, EngineState]:
    world = join(make_config(1))
    engine = build(make_config(world.size, **values), world)
    engine.load(saved)
    again = engine.state()
    train(engine, 2, 3)
    return again, engine.state()


def across(values: dict[str, Any], optimizer: dict[str, Any]) -> tuple[bool, bool, float]:
    """DDP to another engine and back: whether either state is kept to the bit, and how far the
    other engine's next step is from DDP's, in parts of it."""
    world = join(make_config(1))
    config = make_config(world.size, optimizer=optimizer)
    ddp, other = build(config, world), build(make_config(world.size, **values,
                                                         optimizer=optimizer), world)
    train(ddp, 0, 2)
    saved = ddp.state()
    other.load(saved)
    taken = digest(other.state(), ranks=False) == digest(saved, ranks=False)
    train(ddp, 2, 3)
    train(other, 2, 3)
    after, back = other.state(), build(config, world)
    back.load(after)
    returned = digest(back.state(), ranks=False) == digest(after, ranks=False)
    start, expected, found = (torch.cat([value.double().reshape(-1) for name, value in
                                         sorted(state.model.items()) if "running" not in name])
                              for state in (saved, ddp.state(), after))
    return taken, returned, float((found - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize(("values", "optimizer"), [
    pytest.param(ENGINES[1], {"name": "lamb", "lr": 0.01}, id="lamb zero0"),
    pytest.param(ENGINES[1], {"name": "lars", "lr": 1.0}, id="lars zero0", marks=pytest.mark.slow),
    pytest.param(ENGINES[2], {"name": "adamw", "lr": 0.01}, id="adamw zero1"),
    pytest.param(ENGINES[3], {"name": "sgd_caffe"}, id="sgd_caffe zero2", marks=pytest.mark.slow),
    pytest.param(ENGINES[2], {"nesterov": True}, id="nesterov zero1", marks=pytest.mark.slow),
    pytest.param(ENGINES[1], {"clip_norm": 0.1}, id="clipped zero0"),
    pytest.param(ENGINES[2], {"clip_norm": 0.1}, id="clipped zero1", marks=pytest.mark.slow)])
def test_every_optimizer_crosses_the_engines_and_steps_alike(
        values: dict[str, Any], optimizer: dict[str, Any]) -> None:
    for taken, returned, apart in run_ranks(across, 2, values, {"decay": "weights", **optimizer}):
        assert taken, "what the engine loaded is not what DDP saved"
        assert returned, "what DDP loaded is not what the engine saved"
        assert apart < 1e-4
