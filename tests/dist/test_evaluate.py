"""Evaluation on several ranks: each sample once at any world, the run's bits left alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from launcher.frozen.freeze import create_run
from resnet_dist.evaluate.views import eval_loader
from resnet_dist.config.schema import Config
from resnet_dist.config.load import config_from_dict, load_frozen
from resnet_dist.ranks.distributed import all_sum, init_world, shutdown
from resnet_dist.evaluate.passes import predict
from resnet_dist.evaluate.report import Request, evaluate_checkpoint
from resnet_dist.evaluate.judge import Outcomes
from resnet_dist.watch.metrics import read_lines
from resnet_dist.models.build import build_model
from resnet_dist.run.paths import RunPaths
from resnet_dist.ranks.preemption import SignalFlag
from resnet_dist.train import train
from tests.dist.harness import RankFailed, run_ranks

STEPS = 12
SAMPLES = 359  # of the digits' validation split: a prime, so that no world divides it


def config_of(digits: Path, runs: Path, name: str, **changes: Any) -> Config:
    return config_from_dict({
        "name": name, "runs": str(runs), "data": str(digits), "steps": STEPS, "batch_size": 16,
        "bn_batch": 4, "model": "resnet20", "threads": 1, "device": "cpu", "precision": "fp32",
        "augment": {"name": "pad_crop", "size": 32}, "schedule": {"name": "cosine"},
        "optimizer": {"lr": 0.02}, "ema": {"decay": 0.5}, "checkpoint": {"every_steps": 6},
        "log": {"every_steps": 4}, "launch": {"ranks_per_node": 2},
        "eval": {"every_steps": 1000, "resize": None, "size": 32}, **changes})


# -- Each sample once ------------------------------------------------------------------------------

def outcomes_of(config: Config) -> tuple[Outcomes, int]:
    """What one rank returns: the global outcomes, and how many samples its own slice had."""
    world = init_world(config)
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10).eval()
    own = 0
    with eval_loader(config, world) as views:
        for group in views:
            own += len(group.labels)
    with eval_loader(config, world) as views:
        found = predict([(model, lambda x: x.permute(0, 3, 1, 2) / 255.0 - 0.5)], views, world)
    total = int(all_sum(torch.tensor([own]), world))
    assert total == SAMPLES, "the slices must cover the split"
    shutdown()
    return found, own


@pytest.mark.parametrize("protocol", ["1crop", "multiscale"])
def test_every_sample_is_seen_once_and_judged_alike_at_world_1_2_3_4(
        digits: Path, tmp_path: Path, protocol: str) -> None:
    expected = None
    for world in (1, 2, 3, 4) if protocol == "1crop" else (1, 3):
        config = config_of(digits, tmp_path, "w", eval={
            "resize": None, "size": 32, "protocol": protocol, "scales": [16, 24],
            "batch_size": 100 if world == 1 else 17})
        ranks = run_ranks(outcomes_of, world, config)
        assert sum(own for _, own in ranks) == SAMPLES
        assert max(own for _, own in ranks) - min(own for _, own in ranks) <= 1
        for found, _ in ranks:
            expected = expected or found
            assert (found.sample_ids == np.arange(SAMPLES)).all()
            for exact in ("labels", "predicted", "places"):
                assert (getattr(found, exact) == getattr(expected, exact)).all()
            # Batches of other sizes are computed by other kernels: float32 rounding remains.
            np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=2e-5)
            np.testing.assert_allclose(found.confidences, expected.confidences, rtol=0, atol=2e-5)


class Faulty:
    """Views that lose their last group, or show the first in its place."""

    def __init__(self, views: Any, fault: str) -> None:
        self.groups, self.num_samples, self.fault = list(views), views.num_samples, fault

    def __iter__(self) -> Any:
        yield from self.groups[:-1]
        if self.fault == "repeated":
            yield self.groups[0]


def predict_faulty(config: Config, fault: str) -> None:
    world = init_world(config)
    with eval_loader(config, world) as views:
        predict([(lambda x: torch.zeros(len(x), 10), lambda x: x)], Faulty(views, fault), world)


@pytest.mark.parametrize("fault", ["lost", "repeated"])
def test_a_sample_seen_twice_or_never_is_an_error(
        digits: Path, tmp_path: Path, fault: str) -> None:
    config = config_of(digits, tmp_path, "w",
                       eval={"resize": None, "size": 32, "batch_size": 60})
    with pytest.raises(RankFailed, match="each must be seen once"):
        run_ranks(predict_faulty, 2, config, fault)


# -- The run is not disturbed ----------------------------------------------------------------------

def train_rank(root: Path) -> int:
    run = RunPaths(root)
    config = load_frozen(run.config)
    with SignalFlag() as signals:
        code = train(run, config, init_world(config), signals)
    shutdown()
    return code


def hashes(run: RunPaths) -> dict[str, str]:
    files = json.loads(run.checkpoint(STEPS).state.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def curve(run: RunPaths) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(run.metrics, "train")]


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A short run that evaluated and drew pictures every 3 steps, on two ranks; two were traced."""
    folder = tmp_path_factory.mktemp("runs")
    run = create_run(config_of(
        digits, folder, "often", precision="bf16", profile="5:7",
        log={"every_steps": 4, "panels_every_steps": 3},
        eval={"every_steps": 3, "resize": None, "size": 32, "protocol": "flip"}))
    assert run_ranks(train_rank, 2, run.root) == [0, 0]
    return run


def test_a_run_that_evaluates_draws_and_profiles_has_the_bits_of_one_that_does_not(
        digits: Path, finished: RunPaths) -> None:
    rare = create_run(config_of(digits, finished.root.parent, "rare", precision="bf16",
                                log={"every_steps": 4, "panels_every_steps": 0}))
    assert run_ranks(train_rank, 2, rare.root) == [0, 0]
    assert len(read_lines(finished.metrics, "val")) == 4
    assert len(read_lines(rare.metrics, "val")) == 1
    assert hashes(finished) == hashes(rare)
    assert curve(finished) == curve(rare)
    assert images_on_board(finished) == {
        "train/images": [1, 3, 6, 9, 12], "layers/batch_norm": [1, 3, 6, 9, 12],
        **{tag: [3, 6, 9, 12] for tag in ("val/confusion", "val/classes", "val/reliability",
                                          "val/mistakes", "layers/responses")}}
    assert images_on_board(rare) == {}
    assert finished.trace(5, 7).stat().st_size > 10_000


def images_on_board(run: RunPaths) -> dict[str, list[int]]:
    board = EventAccumulator(str(run.tensorboard), size_guidance={IMAGES: 0})
    board.Reload()
    return {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}


# -- Checkpoints -----------------------------------------------------------------------------------

def evaluated(request: Request) -> dict[str, Any] | None:
    return evaluate_checkpoint(request)


def test_a_checkpoint_has_the_figures_that_training_saw(finished: RunPaths) -> None:
    seen = read_lines(finished.metrics, "val")[-1]
    for weights, prefix in (("raw", ""), ("ema", "ema_")):
        found, other = run_ranks(evaluated, 2, Request(finished.root, weights=weights))
        assert other is None
        for key in ("loss", "top1", "top5"):
            assert found[key] == seen[prefix + key], (weights, key)
        assert found["samples"] == SAMPLES
    assert seen["loss"] != seen["ema_loss"]


def test_three_ranks_report_what_one_reports_to_the_bit_where_batches_are_alike(
        finished: RunPaths) -> None:
    request = Request(finished.root, step=6, batch_size=1)  # one image at a time on any rank
    alone = run_ranks(evaluated, 1, request)[0]
    three = run_ranks(evaluated, 3, request)
    assert three == [alone, None, None]
    report = Path(alone["report"])
    assert report.parent == finished.evaluations
    assert json.loads((report / "result.json").read_text())["step"] == 6
    assert list((finished.tensorboard / "eval").glob("events.*"))


def test_the_command_evaluates_ensembles_and_responses(
        finished: RunPaths, tmp_path: Path) -> None:
    shutil.copytree(finished.root, tmp_path / "twin")
    command = [Path(sys.executable).with_name("resnet-dist"), "eval", "often", "--runs",
               finished.root.parent, "--weights", "raw", "--json"]
    both = subprocess.run([*command, "--ensemble", f"{tmp_path / 'twin'}@6", "--responses"],
                          capture_output=True, text=True, timeout=240)
    assert both.returncode == 0, both.stderr
    result = json.loads(both.stdout)
    assert result["members"] == ["often@12", "twin@6"]
    responses = json.loads((Path(result["report"]) / "responses.json").read_text())
    assert list(responses) == ["often@12", "twin@6"]
    assert len(responses["often@12"]["network_order"]) == 19
    one, other = (run_ranks(evaluated, 1, Request(finished.root, step=step, weights="raw"))[0]
                  for step in (12, 6))
    assert result["loss"] < max(one["loss"], other["loss"])
    assert result["loss"] not in (one["loss"], other["loss"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"step": 7}, "--step = 7: often has no such checkpoint; there is 12, 6"),
    ({"split": "test"}, "eval.split = test"),
    ({"size": 24}, "subtracts a mean image of 32 pixels"),
    ({"ensemble": ("twin@x",)}, "RUN@STEP"),
])
def test_a_wrong_request_names_the_remedy(
        finished: RunPaths, changes: dict[str, Any], message: str) -> None:
    from resnet_dist.config.schema import ConfigError

    config = load_frozen(finished.config)
    if "size" in changes:
        text = finished.config.read_text().replace("normalize: channel", "normalize: pixel")
        assert text != finished.config.read_text()
        original = finished.config.read_text()
        finished.config.write_text(text)
    try:
        with pytest.raises(ConfigError) as caught:
            evaluate_checkpoint(Request(finished.root, **changes))
    finally:
        if "size" in changes:
            finished.config.write_text(original)
    assert message in str(caught.value)
    assert config == load_frozen(finished.config)
