"""From a configuration to the parts that the loop and the evaluation put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.data.augmentation.normalize import normalization
from resnet_dist.data.loader import TrainLoader
from resnet_dist.data.shards.manifest import Manifest
from resnet_dist.models.build import build_model
from resnet_dist.models.weights import WeightsError, init_from
from resnet_dist.ranks.distributed import World
from resnet_dist.run.paths import DatasetPaths


def model_of(config: Config, manifest: Manifest) -> torch.nn.Module:
    """The configured network on the CPU; the seed decides its weights."""
    torch.manual_seed(config.seed)
    return build_model(num_classes=manifest.num_classes, bn_batch=config.bn_batch,
                       **dataclasses.asdict(config.model))


def fresh_model(config: Config, manifest: Manifest) -> torch.nn.Module:
    """`model_of`, with the weights of `init_from` where a run is to start from some.

    Raises: ConfigError where they do not fit, listing the keys.
    """
    model = model_of(config, manifest)
    if config.init_from is not None:
        try:
            init_from(model, Path(config.init_from), new_classifier=config.new_classifier)
        except WeightsError as error:
            raise ConfigError(str(error)) from None
    return model


def normalization_of(config: Config, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """float32 (mean, 1 / std), broadcastable to [n, 3, h, w], for pixels in [0, 1]."""
    return normalization(manifest, DatasetPaths(data_path(config)), config.augment.normalize,
                         config.augment.size)


def train_loader(config: Config, world: World, first_step: int,
                 alive: Callable[[], None] = lambda: None) -> TrainLoader:
    """This rank's share of every global batch from `first_step` on, without end.

    `alive` is called while shards are staged, which may take longer than a step ever should.
    """
    return TrainLoader(
        data_path(config), "train", config.augment, seed=config.seed,
        batch_size=config.batch_size, rank=world.rank, world=world.size,
        threads=config.data.threads or world.cores, prefetch=config.data.prefetch,
        verify=config.data.verify, first_step=first_step, stage_dir=config.data.stage_dir,
        read_ahead=config.data.read_ahead, staged=lambda there, total: alive(),
        repeats=config.data.repeats, groups=config.batch_size // (config.bn_batch or 1))


def data_path(config: Config) -> Path:
    assert config.data.path is not None, "check_dataset refuses this"
    return Path(config.data.path)
