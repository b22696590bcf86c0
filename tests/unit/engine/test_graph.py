"""A recorded step against the same step run as always. Recording needs a GPU: here a stand-in
replays by running what it was given again, on the tensors it was given then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import ConfigError
from resnet_dist.engine import ddp as engines
from resnet_dist.engine.graph import WARM_STEPS, RecordedStep
from tests.dist.harness import run_ranks
from tests.dist.runs import build, digest, join, make_config, train


class Again:
    """Replays by running again; like a recording, it never sees new Python values."""

    def __init__(self) -> None:
        self.warmed = self.recorded = 0

    def warm(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return work


def run(recorded: bool, **values: Any) -> tuple[str, dict[str, float]]:
    """Digest and window after more steps than are warmed up."""
    config = make_config(1)
    world = join(config)
    engine = build(make_config(world.size, **values), world)
    if recorded:
        assert isinstance(engine, engines.DDPEngine)
        engine._recorded = RecordedStep(engine._share_gradients, Again())
        engine._leaf, engine._leaf_gradients = engine._flat_gradients()
        engine._ddp = None
    train(engine, 0, WARM_STEPS + 3)
    window = engine.state().ranks["window"].sum(0).tolist()
    return digest(engine.state(), ranks=False), window


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("values", [
    {}, {"precision": "bf16"}, {"ema": {"decay": 0.9}, "optimizer": {"clip_norm": 1.0}},
    {"augment": {"mixup": 0.2}, "model": {"stochastic_depth": 0.5}}], ids=str)
def test_a_recorded_step_computes_the_bits_of_a_step(values: dict[str, Any]) -> None:
    assert run(True, **values) == run(False, **values)


def test_recorded_ranks_sum_what_one_rank_computes() -> None:
    (together, window), *_ = run_ranks(run, 2, True)
    again = run_ranks(run, 2, True)
    assert {found for found, _ in again} == {together}
    _, alone_window = run_ranks(run, 1, False)[0]
    # 6 steps: rounding has not grown yet. Ranks start equal and stay so.
    assert window[0] == pytest.approx(alone_window[0], rel=1e-3)
    assert window[3] == alone_window[3]


def test_another_shape_is_warmed_up_and_recorded_anew() -> None:
    recorder, seen = Again(), []
    step = RecordedStep(lambda x, none: seen.append(float(x.sum())), recorder)
    for size in (2, 3):
        for value in range(WARM_STEPS + 3):
            step(torch.full((size,), float(value)), None)
    assert recorder.warmed == 2 * WARM_STEPS
    assert recorder.recorded == 2
    assert seen == [size * value for size in (2, 3) for value in range(WARM_STEPS + 3)]


def test_a_recording_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs = true: needs mode=fast"):
        config_from_dict({"name": "x", "cuda_graphs": True, "mode": "exact"})
    config = make_config(1, cuda_graphs=True)
    with pytest.raises(ConfigError, match="computes on cpu"):
        build(config, join(config))
