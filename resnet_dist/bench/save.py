"""What saving costs training: the step that waits for the whole write against one that does not.

`python -m resnet_dist.bench.save FOLDER [--model NAME] ...` prints one JSON object. One process
trains on made-up images; each round saves once in each way. The stall is what the loop waits; a
write in the background also takes processor time from the steps beside it, which is counted too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_dist.config.load import config_from_dict
from resnet_dist.config.schema import Config
from resnet_dist.engine.core import Engine
from resnet_dist.engine.ddp import make_engine
from resnet_dist.models.build import build_model
from resnet_dist.ranks.distributed import init_world
from resnet_dist.run.checkpoint import CheckpointWriter
from resnet_dist.run.paths import RunPaths


def measure(config: Config, folder: Path, *, size: int, rounds: int,
            between: int) -> dict[str, Any]:
    """Seconds of a step, and per way of saving: the stall, and all that a save takes from training.

    Args:
        size: pixels of the made-up images.
        between: steps before each save, nothing else going on.
    """
    torch.manual_seed(0)
    one = np.ones((1, 3, 1, 1), np.float32)
    engine = make_engine(build_model(config.model.name, num_classes=1000, bn_batch=config.bn_batch),
                         config, init_world(config), (0 * one, one))
    images = torch.randint(256, (config.batch_size, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(1000, (config.batch_size,))

    def step() -> float:
        began = time.perf_counter()
        engine.train_step(images, labels, None, 0.01)
        engine.read_window()  # waits for the device
        return time.perf_counter() - began

    writer = CheckpointWriter(RunPaths(folder), keep_last=2)
    for _ in range(2):
        step()
    plain: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {"synchronous": [], "asynchronous": []}
    written = 0
    for number in range(rounds):
        for way, results in found.items():
            plain += [step() for _ in range(between)]
            stall_s, beside, size_bytes = _save(engine, writer, number + 1, way, step)
            usual_s = statistics.median(plain)
            results.append((stall_s, stall_s + sum(each - usual_s for each in beside)))
            written = size_bytes
    return {"model": config.model.name, "rounds": rounds, "step_s": statistics.median(plain),
            "mb": written / 1e6,
            **{way: {"stall_s": statistics.median(stall for stall, _ in results),
                     "lost_s": statistics.median(lost for _, lost in results)}
               for way, results in found.items()}}


def _save(engine: Engine, writer: CheckpointWriter, number: int, way: str,
          step: Any) -> tuple[float, list[float], int]:
    """Seconds that the loop waited, steps beside the write, bytes."""
    began = time.perf_counter()
    writer.save(number, engine.state(), {})
    done = writer.wait() if way == "synchronous" else []
    stall_s = time.perf_counter() - began
    beside = []
    while not done:
        beside.append(step())
        done = writer.finished()
    if done[0].error:
        raise OSError(done[0].error)
    return stall_s, beside, done[0].size_bytes


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.bench.save")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--between", type=int, default=4)
    asked = parser.parse_args(arguments)
    config = config_from_dict({"name": "bench", "batch_size": asked.batch_size, "bn_batch": None,
                               "model": asked.model})
    found = measure(config, asked.folder, size=asked.size, rounds=asked.rounds,
                    between=asked.between)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
