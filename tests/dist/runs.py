"""What the distributed tests train: small real networks on made-up images, rank by rank."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from resnet_dist.ranks import distributed
from resnet_dist.engine import optim
from resnet_dist.run.checkpoint import EngineState
from resnet_dist.config.schema import Config
from resnet_dist.config.load import config_from_dict
from resnet_dist.data.augmentation.mix import mixer
from resnet_dist.ranks.distributed import World
from resnet_dist.engine.ddp import make_engine
from resnet_dist.engine.core import Engine
from resnet_dist.models.build import build_model

SIZE = 16  # pixels; small, so that a step takes milliseconds
CLASSES = 10


def make_config(world: int, **values: Any) -> Config:
    """ResNet-20 on `SIZE` pixels, batch 32 in groups of 4, with `values` over it."""
    tree: dict[str, Any] = {
        "name": "test", "steps": 1000, "batch_size": 32, "bn_batch": 4, "precision": "fp32",
        "threads": 1, "device": "cpu", "model": {"name": "resnet20"},
        "augment": {"name": "pad_crop", "size": SIZE},
        "schedule": {"name": "milestones", "milestones": [3], "warmup_steps": 2,
                     "warmup_start": 0.1},
        "launch": {"ranks_per_node": world}}
    for key, value in values.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return config_from_dict(tree)


def build(config: Config, world: World) -> Engine:
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, num_classes=CLASSES, bn_batch=config.bn_batch,
                        stochastic_depth=config.model.stochastic_depth)
    shape = (1, 3, 1, 1)
    normalization = (np.full(shape, 0.45, np.float32), np.full(shape, 4.0, np.float32))
    return make_engine(model, config, world, normalization)


def global_batch(config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images uint8 [B, S, S, 3], labels and sample keys int64 [B]: a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(CLASSES, (config.batch_size,), generator=generator)
    images = torch.randint(256, (config.batch_size, SIZE, SIZE, 3), generator=generator)
    tint = (labels * 20)[:, None, None, None]  # something to learn
    keys = torch.randint(2**62, (config.batch_size,), generator=generator)
    return ((images + tint) // 2).to(torch.uint8), labels, keys


def train(engine: Engine, start: int, stop: int) -> None:
    """Take the steps `start ... stop - 1` on this rank's slices."""
    config, world = engine.config, engine.world
    share = config.batch_size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    for step in range(start, stop):
        images, labels, keys = global_batch(config, step)
        lr = optim.lr_at(config.schedule, config.optimizer.lr, step, config.steps)
        mix = mixer(config.augment, config.seed, step, mine.start, config.bn_batch or 1)
        engine.train_step(images[mine], labels[mine], keys[mine], lr, mix)


def digest(state: EngineState, *, ranks: bool = True) -> str:
    """SHA-256 over names, shapes and bytes of everything in `state`."""
    sha = hashlib.sha256()
    parts = [state.model, state.optimizer] + ([state.ranks] if ranks else [])
    for part in parts:
        for name in sorted(part):
            tensor = part[name].contiguous()
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def join(config: Config) -> World:
    return distributed.init_world(config)


def momentum(state: EngineState) -> torch.Tensor:
    """All of it as one vector; after one step without decay, the gradient."""
    keys = sorted(key for key in state.optimizer if key.startswith("momentum_buffer/"))
    return torch.cat([state.optimizer[key].reshape(-1) for key in keys])


def after_an_overflow(values: dict[str, Any]) -> list[torch.Tensor]:
    """A weight before and after an fp16 step that overflows, and the loss's scale after it."""
    world = join(make_config(1, **values))
    engine = build(make_config(world.size, batch_size=8, bn_batch=4, **values), world)
    train(engine, 0, 1)
    state = engine.state()
    state.optimizer["scaler/scale"] = torch.tensor(2.0 ** 120)
    engine.load(state)
    train(engine, 1, 2)
    after = engine.state()
    return [state.model["conv1.weight"], after.model["conv1.weight"],
            after.optimizer["scaler/scale"]]
