"""`eval` on its own, against what training does with the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_dist.build import model_of, normalization_of
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.engine.ddp import make_engine
from resnet_dist.evaluate.report import Loaded, _member
from resnet_dist.kernels import dispatch as kernels
from resnet_dist.kernels import reference
from resnet_dist.ranks.distributed import World
from resnet_dist.run.paths import RunPaths
from tests.dist.runs import make_config


def test_eval_prepares_images_as_training_does_on_a_gpu_too(
        digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a kernel makes four channels, in one rounding; its oracle stands for it here."""
    monkeypatch.setattr(kernels, "normalize", reference.normalize)
    config = make_config(1, data=str(digits), augment={"size": 32})
    manifest, world = load_manifest(digits), World(0, 1, 0, torch.device("cpu"))
    model = model_of(config, manifest)
    engine = make_engine(model, config, world, normalization_of(config, manifest))
    loaded = Loaded(RunPaths(tmp_path), 1, "raw", config, model.eval())
    answer, prepare = _member(loaded, config, world)
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    assert prepare(images).shape == (4, 4, 32, 32)
    assert torch.equal(prepare(images), engine.normalize(images))
    with engine.eval_model() as live:
        assert torch.equal(answer(prepare(images)), live(engine.normalize(images)))
