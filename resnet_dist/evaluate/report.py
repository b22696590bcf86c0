"""`resnet-dist eval`: one checkpoint, or several together, judged on every sample of a split.

In: run directories. Out: a report under RUN/eval (JSON and pictures), TensorBoard, and the summary.
`python -m resnet_dist.evaluate.report RUN_DIR [options]` is one process, or one rank of torchrun.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from resnet_dist.build import data_path, model_of, normalization_of
from resnet_dist.config.load import config_from_dict, config_to_dict, load_frozen
from resnet_dist.config.schema import EVAL_PROTOCOLS, Config, ConfigError, LaunchConfig
from resnet_dist.data.loader import DataError
from resnet_dist.data.shards.manifest import Manifest, check_dataset, load_manifest
from resnet_dist.engine.pixels import Pixels
from resnet_dist.engine.precision import autocast_dtype
from resnet_dist.evaluate.judge import Outcomes, figures, log_report, write_report
from resnet_dist.evaluate.passes import Member, predict
from resnet_dist.evaluate.views import eval_loader
from resnet_dist.models.analysis.responses import layer_responses, log_responses, write_responses
from resnet_dist.ranks.distributed import World, broadcast_int, init_world, shutdown
from resnet_dist.run.checkpoint import CheckpointError, EngineState, load, newest_valid
from resnet_dist.run.paths import RunPaths

RESPONSE_IMAGES = 2000  # enough for a standard deviation over every position of every image


@dataclass(frozen=True)
class Request:
    """What `resnet-dist eval` was asked for; None: as the run is configured."""

    run: Path
    step: int | None = None  # None: the newest valid checkpoint
    split: str | None = None
    protocol: str | None = None
    size: int | None = None
    resize: int | None = None  # 0: the image as it is
    batch_size: int | None = None
    weights: str | None = None  # raw or ema; None: ema where the run averages its weights
    ensemble: tuple[str, ...] = ()  # further run directories, PATH or PATH@STEP
    responses: bool = False  # also measure how strongly each layer responds


@dataclass(frozen=True)
class Loaded:
    """One checkpoint as a network that is ready to answer."""

    run: RunPaths
    step: int
    weights: str
    config: Config
    model: nn.Module

    @property
    def label(self) -> str:
        return f"{self.run.name}@{self.step}" + ("-ema" if self.weights == "ema" else "")


def evaluate_checkpoint(request: Request) -> dict[str, Any] | None:
    """Evaluate a checkpoint, or several together; the summary on rank 0, None elsewhere.

    Collective under torchrun; otherwise this process alone. Rank 0 writes the report to
    `RunPaths.evaluations` and TensorBoard.
    Raises: ConfigError, CheckpointError, DataError.
    """
    run = RunPaths(request.run.absolute())
    config = _configure(load_frozen(run.config), request)
    manifest = check_dataset(config)
    world = init_world(config)
    loaded = [_load(run, request.step, request.weights, config, manifest, world)]
    for name in request.ensemble:
        path, _, step = name.partition("@")
        other = RunPaths(Path(path).absolute())
        loaded.append(_load(other, _step_number(name, step), request.weights,
                            _configure(load_frozen(other.config), request), manifest, world))
    members = [_member(part, config, world) for part in loaded]
    with eval_loader(config, world) as views:
        outcomes = predict(members, views, world)
    shutdown()
    if world.rank:
        return None
    if not np.isfinite(outcomes.losses).all():
        raise ConfigError(f"--step = {loaded[0].step}: {int((~np.isfinite(outcomes.losses)).sum())}"
                          f" of {len(outcomes.losses)} images get logits that are not numbers: the "
                          "run had diverged; pick an earlier step")
    return _report(loaded, members, outcomes, config, manifest, request)


def _configure(config: Config, request: Request) -> Config:
    """The run's configuration with the requested evaluation, on the ranks that are here.

    Raises: ConfigError.
    """
    values = config_to_dict(config)
    for key in ("split", "protocol", "size", "resize", "batch_size"):
        asked = getattr(request, key)
        if asked is not None:
            values["eval"][key] = None if key == "resize" and asked == 0 else asked
    checked = config_from_dict(values)
    # What the run was launched with says nothing about the ranks, cores and GPUs at work here.
    here = LaunchConfig(ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return dataclasses.replace(checked, launch=here,
                               device="cpu" if checked.device == "cpu" else "auto")


def _step_number(name: str, text: str) -> int | None:
    if text and not text.isdigit():
        raise ConfigError(f"--ensemble = {name}: write RUN, or RUN@STEP with a whole number")
    return int(text) if text else None


def _load(run: RunPaths, step: int | None, weights: str | None, config: Config,
          manifest: Manifest, world: World) -> Loaded:
    """Collective. Raises: ConfigError, CheckpointError."""
    if step is None:
        # Rank 0 chooses: a run that goes on may commit another checkpoint between two looks.
        found = newest_valid(run) if world.rank == 0 else None
        step = broadcast_int(found[0].step if found else -1, world)
        if step < 0:
            raise ConfigError(f"RUN = {run.root}: has no checkpoint yet")
    elif not run.checkpoint(step).root.is_dir():
        have = ", ".join(str(other.step) for other in run.checkpoints_on_disk()) or "none"
        raise ConfigError(f"--step = {step}: {run.name} has no such checkpoint; there is {have}")
    state, meta = load(run.checkpoint(step))
    if tuple(meta["classes"]) != manifest.classes:
        raise ConfigError(f"RUN = {run.root}: was trained on {len(meta['classes'])} classes that "
                          f"are not the {manifest.num_classes} of the data set evaluated; name "
                          "runs of one data set")
    averages = _averages(state)
    if weights == "ema" and not averages:
        raise ConfigError(f"--weights = ema: {run.name} keeps no averaged weights (ema.decay = "
                          "null); use --weights raw")
    chosen = "ema" if averages and weights != "raw" else "raw"
    model = model_of(config, manifest)
    model.load_state_dict(averages if chosen == "ema" else state.model)
    model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Loaded(run, step, chosen, config, model.eval())


def _averages(state: EngineState) -> dict[str, Tensor]:
    prefix = "ema/"
    return {name[len(prefix):]: value for name, value in state.optimizer.items()
            if name.startswith(prefix)}


def _member(loaded: Loaded, shown: Config, world: World) -> Member:
    """`loaded` with its own normalization and precision. Raises: ConfigError, DataError."""
    config = loaded.config
    if config.augment.normalize == "pixel" and shown.eval.size != config.augment.size:
        raise ConfigError(f"--size = {shown.eval.size}: {loaded.run.name} subtracts a mean image "
                          f"of {config.augment.size} pixels; evaluate it at that size")
    own = load_manifest(data_path(config))
    pixels = Pixels(normalization_of(config, own), world.device)
    dtype = autocast_dtype(config, world.device)

    def answer(x: Tensor) -> Tensor:
        with torch.autocast(world.device.type, dtype=dtype or torch.bfloat16,
                            enabled=dtype is not None):
            logits: Tensor = loaded.model(x)
            return logits.float()

    return answer, pixels.normalize


def _report(loaded: list[Loaded], members: list[Member], outcomes: Outcomes, config: Config,
            manifest: Manifest, request: Request) -> dict[str, Any]:
    """Files and TensorBoard; the summary. Rank 0 alone."""
    first, options = loaded[0], config.eval
    seen = [options.split, options.protocol, *(["ema"] if first.weights == "ema" else [])]
    if (request.size, request.resize) != (None, None):
        seen.append(f"{options.size}of{options.resize or 'whole'}")
    tag = "_".join(seen + [part.label for part in loaded[1:]])
    folder = first.run.evaluations / f"step_{first.step:08d}_{tag}"
    about = {"run": first.run.name, "step": first.step, "weights": first.weights,
             "members": [part.label for part in loaded], "data": config.data.path,
             "split": options.split, "protocol": options.protocol, "report": str(folder)}
    if options.protocol == "multiscale":
        about["scales"] = list(options.scales)
    else:
        about |= {"resize": options.resize, "size": options.size}
    drawn = figures(outcomes, manifest.classes)
    result = write_report(folder, outcomes, manifest.classes, about, drawn)
    board = SummaryWriter(str(first.run.tensorboard / "eval"))
    log_report(board, tag, first.step, result, drawn)
    if request.responses:
        alone = World(0, 1, 0, next(first.model.parameters()).device)
        curves = {}
        for part, (_, prepare) in zip(loaded, members, strict=True):
            curves[part.label] = layer_responses(part.model, _images(part.config, prepare, alone))
        write_responses(curves, folder)
        log_responses(curves, board, first.step)
    board.close()
    return result


def _images(config: Config, prepare: Callable[[Tensor], Tensor], alone: World) -> Iterator[Tensor]:
    """The first `RESPONSE_IMAGES` centre crops of the split, prepared."""
    options = dataclasses.replace(config.eval, protocol="1crop")
    with eval_loader(dataclasses.replace(config, eval=options), alone) as views:
        seen = 0
        for group in views:
            if seen >= RESPONSE_IMAGES:
                break
            seen += len(group.labels)
            for _, images in group.images:
                yield prepare(images.to(alone.device))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.evaluate.report")
    parser.add_argument("run", type=Path)
    parser.add_argument("--protocol", choices=EVAL_PROTOCOLS)
    parser.add_argument("--weights", choices=["raw", "ema"])
    parser.add_argument("--split")
    parser.add_argument("--ensemble", action="append", default=[])
    parser.add_argument("--responses", action="store_true")
    for name in ("--step", "--size", "--resize", "--batch-size"):
        parser.add_argument(name, type=int)
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        result = evaluate_checkpoint(Request(**options | {"ensemble": tuple(options["ensemble"])}))
    except (ConfigError, CheckpointError, DataError) as error:
        logging.error("%s", error)
        # Leave at once: the other ranks notice the closed connection.
        logging.shutdown()
        os._exit(2)
    if result is not None:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
