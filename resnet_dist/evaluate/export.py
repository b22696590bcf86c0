"""Weights of a checkpoint for another program.

`python -m resnet_dist.evaluate.export RUN FORMAT FILE`.

In: the newest valid checkpoint of a run, or one named by --step. Out: one file; see
`models.weights.export_weights` for the formats.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from resnet_dist.build import model_of
from resnet_dist.config.load import load_frozen
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import check_dataset
from resnet_dist.models.weights import FORMATS, WeightsError, export_weights
from resnet_dist.run.checkpoint import CheckpointError, load_model, newest_valid
from resnet_dist.run.paths import RunPaths


def export(run: RunPaths, step: int | None, form: str, path: Path) -> int:
    """Write the weights of a checkpoint to `path`; the checkpoint's step.

    Raises: ConfigError, CheckpointError, WeightsError.
    """
    config = load_frozen(run.config)
    found = newest_valid(run) if step is None else (run.checkpoint(step), None)
    if found is None:
        raise ConfigError(f"RUN = {run.root}: has no checkpoint yet")
    checkpoint = found[0]
    model = model_of(config, check_dataset(config))
    model.load_state_dict(load_model(checkpoint)[0])
    export_weights(model, path, form, input_size=config.eval.size)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # alike for all formats: safetensors makes files of mode 0600
    return checkpoint.step


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.evaluate.export")
    parser.add_argument("run", type=Path)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--step", type=int)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    try:
        step = export(RunPaths(options.run.absolute()), options.step, options.format, options.path)
    except (ConfigError, CheckpointError, WeightsError) as error:
        logging.error("%s", error)
        return 2
    sys.stdout.write(f"{step}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
