"""What a run will cost, told before it is queued."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from launcher.foreground import train_here
from launcher.submission import costs
from launcher.submission.costs import estimate, free_bytes
from launcher.submission.preflight import Order, check
from resnet_dist.config.load import config_from_dict, dump_config, load_config
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.models.catalog.names import MODELS
from resnet_dist.models.catalog.sizes import SIZES
from resnet_dist.run.paths import RunPaths
from tests.unit.launcher import slurm_stand_in

ROOT = Path(__file__).resolve().parents[4]
RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
IMAGENET = ROOT / "configs" / "imagenet" / "resnet50_he2015.yaml"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster with GPUs in front of PATH; the folder of its programs."""
    folder = slurm_stand_in.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return folder


def asking(**launch: object) -> Config:
    return config_from_dict({"name": "x", "data": "d", "batch_size": 12_288, "bn_batch": 32,
                             "launch": launch})


def test_the_table_of_sizes_is_what_the_networks_are() -> None:
    """All names; the deep ones, which take seconds each to build, by a sibling's figures."""
    from resnet_dist.models.analysis.summary import summarize_name

    assert set(SIZES) == set(MODELS)
    for name in ("resnet18", "resnet50", "resnet50_v1", "resnext50_32x4d", "wide_resnet50_2",
                 "seresnet50", "resnet20", "plain56", "vgg16", "preresnet152"):
        found = summarize_name(name, num_classes=10 if MODELS[name].input_size == 32 else 1000)
        assert SIZES[name] == pytest.approx((found.parameters / 1e6, found.flops / 1e9), rel=0.01)


def test_the_estimate_without_earlier_runs_says_what_it_assumes(digits: Path, tmp_path: Path,
                                                                cluster: Path) -> None:
    config = load_config(IMAGENET, [f"data={digits}", "cluster=gpu", f"runs={tmp_path}"])
    told = estimate(config, load_manifest(digits))
    assert "assumed: an A100's 2,470 with ResNet-50" in told.source
    assert told.images_per_s == pytest.approx(2470 * 8 * 4.09 / 3.86, rel=0.01)
    assert told.hours == pytest.approx(600_000 * 256 / told.images_per_s / 3600)
    assert told.gpu_hours == pytest.approx(told.hours * 8)
    assert told.jobs == 1
    assert told.epochs == pytest.approx(600_000 * 256 / 1438)
    assert dict(told.rows(config))["GPU-hours"]
    longer = load_config(IMAGENET, [f"data={digits}", "cluster=gpu", "launch.time_minutes=60"])
    assert estimate(longer, None).jobs == math.ceil(told.hours)


def test_the_estimate_takes_the_speed_of_an_earlier_run(digits: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "before")
    run.root.mkdir()
    config = load_config(RECIPE, [f"data={digits}", f"runs={tmp_path}"])
    run.config.write_text(dump_config(config))
    run.metrics.write_text("".join(json.dumps({"kind": "train", "images_per_s": rate}) + "\n"
                                   for rate in (1, 300, 400, 500, 9000)) + '{"kind": "va')
    told = estimate(config, None)
    assert told.images_per_s == 400, "the median"
    assert told.source == "as run before had on 2 ranks"
    wider = load_config(RECIPE, [f"data={digits}", f"runs={tmp_path}", "launch.ranks_per_node=4"])
    assert estimate(wider, None).images_per_s == 800
    other = load_config(RECIPE, [f"data={digits}", f"runs={tmp_path}", "model=resnet32"])
    assert "assumed" in estimate(other, None).source


def test_checkpoints_are_as_large_as_estimated() -> None:
    """Against the tensors themselves: weights, momentum, average, BatchNorm statistics."""
    from resnet_dist.models.build import build_model

    for settings, copies in (({}, 2), ({"ema": {"decay": 0.9}}, 3),
                             ({"optimizer": {"name": "adamw"}}, 3)):
        config = config_from_dict({"name": "x", "model": "resnet18", **settings})
        real = 4 * copies * sum(p.numel() for p in build_model("resnet18",
                                                               num_classes=1000).parameters())
        assert costs.checkpoint_bytes(config) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("keep", "count"), [
    ({"every_steps": 100}, 4), ({"every_steps": 500}, 2), ({"every_steps": 100, "keep_last": 1}, 2),
    ({"every_steps": 100, "keep_every_steps": 250}, 8),
    ({"every_steps": 10, "keep_best": True}, 5)])
def test_as_many_checkpoints_as_can_be_on_disk_at_once(keep: dict, count: int) -> None:
    config = config_from_dict({"name": "x", "steps": 1000, "checkpoint": keep})
    assert costs.checkpoints_kept(config) == count


def test_a_full_disk_and_a_used_up_quota_are_told(digits: Path, tmp_path: Path, cluster: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(RECIPE, [f"data={digits}", f"runs={tmp_path}/runs", "launch.nodes=1"])
    device = costs._device(tmp_path)
    slurm_stand_in.program(cluster, "quota", f"echo 'Disk quotas for user me (uid 1):'\n"
                           f"echo '  {device}  900 800* 1000 6days 5 0 0'")
    assert free_bytes(tmp_path / "runs") == 100 * 1024
    with pytest.raises(ConfigError) as refused:
        check(config, Order(RECIPE, local=True))
    assert f"runs = {tmp_path}/runs: 4 checkpoints of 2.3 MB need 9.2 MB, 102.4 kB are left" \
        in str(refused.value)
    with pytest.raises(ConfigError, match=r"102\.4 kB are left"):
        train_here(RECIPE, [f"data={digits}", f"runs={tmp_path}/runs", "launch.nodes=1"])
    assert not (tmp_path / "runs").exists()
