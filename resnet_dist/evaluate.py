"""Exact distributed evaluation: every sample once, at any world size.

In: a module in eval mode and a rank's contiguous slice of a split. Out: the same numbers on all
ranks. `python -m resnet_dist.evaluate RUN_DIR [--step N]` evaluates a checkpoint and prints JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.build import eval_loader, model_of, normalization_of
from resnet_dist.checkpoint import CheckpointError, load_model, newest_valid
from resnet_dist.config import ConfigError, load_frozen
from resnet_dist.data.loader import DataError, EvalLoader
from resnet_dist.data.manifest import check_dataset
from resnet_dist.distributed import World, all_sum, init_world, shutdown
from resnet_dist.engine import DDPEngine
from resnet_dist.losses import correct
from resnet_dist.paths import RunPaths


def evaluate(model: nn.Module, normalize: Callable[[Tensor], Tensor], loader: EvalLoader,
             world: World) -> dict[str, float]:
    """Loss and accuracies over all ranks' batches. Collective.

    Args:
        model: in eval mode; maps prepared images [n, 3, S, S] to logits [n, classes].
        normalize: uint8 [n, S, S, 3] on the device -> what the model takes.
        loader: this rank's slice; closed on the way out.
    Returns:
        loss (mean cross-entropy, nats), top1 and top5 (percent), samples (count).
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    with torch.no_grad(), loader:
        for batch in loader:
            images = batch.images.to(world.device, non_blocking=True)
            labels = batch.labels.to(world.device, non_blocking=True)
            logits = model(normalize(images)).float()
            top1, top5 = correct(logits, labels)
            totals += torch.stack([
                F.cross_entropy(logits, labels, reduction="sum").double(), top1.double(),
                top5.double(), torch.full_like(top1, len(labels), dtype=torch.float64)])
    loss, top1, top5, samples = all_sum(totals, world).tolist()
    return {"loss": loss / samples, "top1": 100 * top1 / samples, "top5": 100 * top5 / samples,
            "samples": int(samples)}


def evaluate_checkpoint(run: RunPaths, step: int | None) -> dict[str, float]:
    """Evaluate one checkpoint of a run (None: the newest valid one) on its evaluation split.

    Collective under torchrun; otherwise this process alone.
    Raises: ConfigError, CheckpointError, DataError.
    """
    config = load_frozen(run.config)
    manifest = check_dataset(config)
    if step is None:
        found = newest_valid(run)
        if found is None:
            raise ConfigError(f"RUN = {run.root}: has no checkpoint yet")
        paths = found[0]
    else:
        paths = run.checkpoint(step)
        if not paths.root.is_dir():
            have = ", ".join(str(other.step) for other in run.checkpoints_on_disk()) or "none"
            raise ConfigError(f"--step = {step}: no such checkpoint; there is {have}")
    weights, _ = load_model(paths)
    world = init_world(config)
    engine = DDPEngine(model_of(config, manifest), config, world,
                       normalization_of(config, manifest))
    engine.module.load_state_dict(weights)
    with engine.eval_model() as model:
        result = evaluate(model, engine.normalize, eval_loader(config, world), world)
    shutdown()
    return {"step": paths.step, **result}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.evaluate")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        result = evaluate_checkpoint(RunPaths(options.run.absolute()), options.step)
    except (ConfigError, CheckpointError, DataError) as error:
        logging.error("%s", error)
        return 2
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
