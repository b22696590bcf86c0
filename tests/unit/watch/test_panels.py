"""Pictures, norms and readings: each beside a plain account of what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.load import (
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    load_frozen,
)
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.augmentation.mix import draw, mixer
from resnet_dist.data.loader import Batch
from resnet_dist.data.shards.manifest import PILLOW_LETTERS, legible, load_manifest
from resnet_dist.data.shards.sheet import CELL, contact_sheet
from resnet_dist.engine.clock import Clock
from resnet_dist.engine.core import Engine
from resnet_dist.engine.ddp import make_engine
from resnet_dist.evaluate.judge import Outcomes
from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import reference
from resnet_dist.models.build import build_model
from resnet_dist.ranks.distributed import World
from resnet_dist.run.curves import read_lines
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch import panels as panels_module
from resnet_dist.watch.gauges import Gauges
from resnet_dist.watch.introduce import settings
from resnet_dist.watch.metrics import Metrics
from resnet_dist.watch.panels import Panels, seen_images, surest_mistakes

ALONE = World(0, 1, 0, torch.device("cpu"))
CLASSES = tuple(f"class {number}" for number in range(10))


def configured(**values: Any) -> Config:
    return config_from_dict({
        "name": "test", "batch_size": 16, "bn_batch": 8, "precision": "fp32", "device": "cpu",
        "augment": {"name": "pad_crop", "size": 32}, **values})


def engine_of(config: Config) -> Engine:
    torch.manual_seed(0)
    mean = np.array([0.49, 0.48, 0.44], np.float32).reshape(1, 3, 1, 1)
    deviation = np.array([0.24, 0.24, 0.26], np.float32).reshape(1, 3, 1, 1)
    return make_engine(build_model("resnet20", num_classes=10, bn_batch=config.bn_batch), config,
                       ALONE, (mean, 1 / deviation))


def some_batch(count: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(4, torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8),
                 torch.arange(count) % 10, np.arange(count), np.zeros(count, np.int64))


# -- Images ----------------------------------------------------------------------------------------

def test_the_images_shown_are_those_that_the_network_got_to_the_grey_level() -> None:
    batch = some_batch()
    images, captions = seen_images(batch, None, engine_of(configured()), CLASSES)
    np.testing.assert_array_equal(np.stack(images), batch.images[:8].numpy())
    assert captions == [[f"class {label}"] for label in range(8)]


def test_a_gpus_fourth_channel_is_left_out_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "normalize", reference.normalize)
    batch = some_batch()
    images, _ = seen_images(batch, None, engine_of(configured()), CLASSES)
    np.testing.assert_array_equal(np.stack(images), batch.images[:8].numpy())


def test_mixed_images_are_shown_mixed_with_both_labels_and_their_shares() -> None:
    config = configured(augment={"name": "pad_crop", "size": 32, "cutmix": 1.0})
    batch = some_batch()
    mix = mixer(config.augment, config.seed, 4, 0, 8)
    (drawn,) = draw(config.augment, config.seed, 4, 0, 1, 32, 32)
    images, captions = seen_images(batch, mix, engine_of(config), CLASSES)
    expected = batch.images[:8].numpy().copy()
    assert drawn.box is not None
    y0, y1, x0, x1 = drawn.box
    assert 0 < (y1 - y0) * (x1 - x0) < 32 * 32
    expected[:, y0:y1, x0:x1] = batch.images[:8].numpy()[::-1, y0:y1, x0:x1]
    np.testing.assert_array_equal(np.stack(images), expected)
    assert captions[0] == [f"{100 * drawn.share:.0f}% class 0",
                           f"{100 * (1 - drawn.share):.0f}% class 7"]


def test_a_sheet_holds_every_picture_in_its_place() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pictures = [np.full((20 + 100 * i, 40, 3), colour, np.uint8)
                for i, colour in enumerate(colours)]
    sheet = contact_sheet(pictures, [["one"], ["two", "2"], []], columns=2)
    assert sheet.width == 2 * CELL
    tall = sheet.height // 2
    centres = [(CELL // 2, CELL // 2), (CELL + CELL // 2, CELL // 2), (CELL // 2, tall + CELL // 2)]
    assert [sheet.getpixel(centre) for centre in centres] == colours


def test_the_surest_mistakes_come_first_and_right_answers_never() -> None:
    confidences = np.array([0.9, 0.3, 0.8, 0.99, 0.5])
    outcomes = Outcomes(np.arange(5), np.zeros(5, int), np.array([1, 2, 0, 3, 0]),
                        np.array([1, 1, 0, 1, 0]), confidences, -np.log(confidences))
    assert surest_mistakes(outcomes, 2).tolist() == [3, 0]
    assert surest_mistakes(outcomes, 9).tolist() == [3, 0, 1]


# -- When, and what becomes of a failure -----------------------------------------------------------

@given(every=st.integers(1, 40), eval_every=st.integers(1, 30), steps=st.integers(1, 120))
def test_validation_pictures_come_with_the_first_validation_in_every_so_many_steps(
        every: int, eval_every: int, steps: int) -> None:
    config = configured(steps=steps, log={"panels_every_steps": every},
                        eval={"every_steps": eval_every})
    panels = Panels(None, config, type("M", (), {"classes": CLASSES}))  # type: ignore[arg-type]
    validations = [step for step in range(1, steps + 1) if step % eval_every == 0 or step == steps]
    expected, drawn_in = set(), 0
    for step in validations:
        if step // every > drawn_in or step == steps:
            expected.add(step)
        drawn_in = max(drawn_in, step // every)
    assert {step for step in validations if panels.due_with_validation(step)} == expected
    assert {step for step in range(1, steps + 1) if panels.due(step)} == {
        1, *range(every, steps + 1, every)}


def test_a_picture_that_fails_alarms_and_leaves_the_run_alone(
        digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = configured(data=str(digits)), RunPaths(tmp_path)
    metrics = Metrics(run, 0)
    panels = Panels(metrics, config, load_manifest(digits))
    monkeypatch.setattr(panels_module, "contact_sheet", lambda *_: 1 / 0)
    assert panels.due(20_000)
    panels.training(20_000, some_batch(), None, engine_of(config))
    assert not panels.due(40_000)
    assert not panels.due_with_validation(40_000)
    metrics.close()
    (alarm,) = read_lines(run.metrics, "event")
    assert alarm["what"] == "alarm"
    assert "ZeroDivisionError" in alarm["text"]


def test_weights_that_are_not_numbers_do_not_stop_a_histogram(tmp_path: Path) -> None:
    metrics = Metrics(RunPaths(tmp_path), 0)
    metrics.histogram("x", 1, np.array([np.nan, 1.0, np.inf]))
    metrics.histogram("x", 2, np.array([np.nan]))
    metrics.close()


# -- Norms, times, readings ------------------------------------------------------------------------

@pytest.mark.parametrize("clip", [None, 1e-3])
def test_norms_are_of_the_last_gradient_before_clipping_and_of_all_weights(
        clip: float | None) -> None:
    batch, found = some_batch(), {}
    for each in (None, clip):
        config = configured(optimizer={"lr": 1e-9, "weight_decay": 0.0, "clip_norm": each})
        engine = engine_of(config)
        engine.train_step(batch.images, batch.labels, None, 1e-9)
        found[each] = engine.norms()
        if each is None:
            plain = float(engine.gradient_vector().double().norm())
    assert found[clip]["gradient_norm"] == pytest.approx(plain, rel=1e-4)
    weights = torch.cat([p.detach().double().reshape(-1) for p in engine.module.parameters()])
    assert found[clip]["parameter_norm"] == pytest.approx(float(weights.norm()), rel=1e-5)


def test_the_parts_of_a_step_add_up_and_pauses_count_nowhere(
        monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("resnet_dist.engine.clock.time.perf_counter", lambda: now[0])
    clock = Clock(20)
    with clock.waiting():
        now[0] += 2.0
    with clock.paused():
        now[0] += 50.0
    now[0] += 8.0
    speed = clock.speed(25, 32, {"comm_s": 0.7, "comm_exposed_s": 0.5})
    assert speed == {"images_per_s": 16.0, "step_s": 2.0, "data_s": 0.4, "comm_s": 0.7,
                     "comm_exposed_s": 0.5, "compute_s": pytest.approx(1.1)}
    assert "compute_s" not in clock.speed(25, 32, {})


def test_a_gpu_is_read_without_waiting_and_a_driver_without_nvml_is_told_once(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_nvml(_: object) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    for name, value in (("memory_allocated", 2e9), ("max_memory_allocated", 3e9),
                        ("memory_reserved", 4e9), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waited"))
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 87)
    gauges = Gauges(torch.device("cuda", 0))
    read = gauges.read()
    assert 0.01 < read.pop("host_memory_gb") < 100
    assert read == {"gpu_memory_gb": 2.0, "gpu_memory_peak_gb": 3.0, "gpu_memory_reserved_gb": 4.0,
                    "gpu_percent": 87.0}
    monkeypatch.setattr(torch.cuda, "utilization", no_nvml)
    assert "gpu_percent" not in gauges.read()
    assert "gpu_percent" not in gauges.read()
    assert caplog.text.count("pynvml") == 1


# -- Settings --------------------------------------------------------------------------------------

def test_settings_show_what_tells_runs_apart_and_what_a_sweep_varies() -> None:
    config = configured(seed=3, optimizer={"lr": 0.1}, model="resnet20",
                        schedule={"milestones": [10, 20]})
    shown = settings(config, {})
    assert shown == {
        "seed": 3, "batch_size": 16, "bn_batch": 8, "precision": "fp32", "device": "cpu",
        "augment.name": "pad_crop", "augment.size": 32, "model.name": "resnet20",
        "optimizer.lr": 0.1, "optimizer.weight_decay": 1e-4, "schedule.milestones": "[10, 20]"}
    swept = settings(config, {"sweep": {"values": {"optimizer.momentum": 0.9}}})
    assert swept == {**shown, "optimizer.momentum": 0.9}


def test_a_range_is_no_number_to_the_base_of_sixty(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(configured()))
    config = load_config(recipe, ["profile=10:12"])
    assert config.profile == "10:12"
    frozen = tmp_path / "config.yaml"
    frozen.write_text(dump_config(config))
    assert load_frozen(frozen).profile == "10:12"


@pytest.mark.parametrize("value", ["5:5", "9:3", "0:201", "100", "a:b", "0:101"])
def test_a_range_that_cannot_be_profiled_is_refused(value: str) -> None:
    tree = config_to_dict(configured(steps=100))
    with pytest.raises(ConfigError, match="profile"):
        config_from_dict({**tree, "profile": value})


def test_a_caption_is_a_name_that_the_font_has_or_the_number_of_the_class() -> None:
    assert legible(("Käfer", "猫", "犬", "tab\t", "long" * 9), PILLOW_LETTERS, 8) == (
        "Käfer", "class 1", "class 2", "class 3", "longlon.")
