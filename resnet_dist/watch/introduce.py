"""What TensorBoard says about a run before its first step: configuration, origin, settings."""

from __future__ import annotations

import json
from typing import Any

from resnet_dist.config.load import config_to_dict, flat
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import Metrics
from resnet_dist.watch.trace import indented

# Columns of TensorBoard's table of runs: these always, and whatever differs from its default.
_ALWAYS = ("seed", "model.name", "batch_size", "optimizer.lr", "optimizer.weight_decay")
_NEVER = ("name", "runs", "profile", "data.", "launch.", "log.", "checkpoint.", "eval.")


def introduce(metrics: Metrics, run: RunPaths, config: Config, step: int, note: str) -> None:
    """Mark the start of an attempt at `step` with a `note`, and write down what is run."""
    metrics.mark("start", step, note)
    metrics.text("config", indented(run.config.read_text(encoding="utf-8")), step)
    origin = json.loads(run.provenance.read_text(encoding="utf-8"))
    metrics.text("provenance", indented(json.dumps(origin, indent=1)), step)
    metrics.hparams(settings(config, origin))


def settings(config: Config, origin: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What tells this run from others: settings that are not the default's, and a sweep's."""
    chosen, default = flat(config_to_dict(config)), flat(config_to_dict(Config()))
    swept = origin.get("sweep", {}).get("values", {})
    shown = {key: value for key, value in chosen.items()
             if key in _ALWAYS or key in swept
             or (value != default.get(key) and not key.startswith(_NEVER))}
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in shown.items()}
