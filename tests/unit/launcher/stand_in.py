# ruff: noqa: T201
"""Run directories and supervisors around the stand-in worker.

`stand_in.py RUN_DIR PLACE` is the supervisor of a node; PLACE is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.job import TrainJob
from launcher.supervise.incarnation import Place, log_to_stderr
from launcher.supervise.supervisor import supervise
from resnet_dist.config.load import config_from_dict, dump_config, load_frozen
from resnet_dist.config.schema import Config
from resnet_dist.run.paths import RunPaths

WORKER = Path(__file__).with_name("worker.py")


def make_run(root: Path, *, steps: int = 60, ranks: int = 2, nodes: int = 1, hang_s: float = 30,
             faults: dict | None = None, **launch: object) -> tuple[RunPaths, Config]:
    config = config_from_dict({
        "name": root.name, "runs": str(root.parent), "steps": steps, "batch_size": 64,
        "bn_batch": None, "device": "cpu",
        "launch": {"nodes": nodes, "ranks_per_node": ranks, "hang_s": hang_s, **launch}})
    run = RunPaths(root)
    for folder in (root, run.checkpoints, run.logs, run.heartbeats):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.config.write_text(dump_config(config))
    (root / "stand_in.json").write_text(
        json.dumps({"steps": steps, "world": config.world, "faults": faults or {}}))
    return run, config


class StandInJob(TrainJob):
    """The job that SLURM runs, around the stand-in worker."""

    def command(self, run: RunPaths) -> list[str]:
        return [sys.executable, str(WORKER), str(run.root)]


def main(root: str, place: dict) -> None:
    run = RunPaths(Path(root))
    place["names"] = tuple(place.get("names", ("127.0.0.1",)))
    log_to_stderr(place.get("node", 0))
    outcome = supervise(run, load_frozen(run.config), Place(**place), StandInJob(root).command(run))
    print(json.dumps([outcome.kind, outcome.cause]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
