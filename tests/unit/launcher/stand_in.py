# ruff: noqa: T201
"""Run directories and supervisors around the stand-in worker.

`stand_in.py RUN_DIR PLACE` is the supervisor of a node; PLACE is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.job import TrainJob
from launcher.journal.events import Process, record
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


def trained(root: Path, *, step: int = 120) -> RunPaths:
    """A run directory as a running job leaves it."""
    run, config = make_run(root, steps=1000)
    record(run, "submitted", where="slurm", nodes=1, steps=config.steps, batch_size=64)
    record(run, "queued", job="77")
    record(run, "started", job="77", restart=0, where="slurm", nodes=["n1"], steps=config.steps,
           batch_size=64, **Process.this().facts)
    record(run, "attempt", attempt=1, step=0, reached=0, ranks=2, pids=[11, 12])
    run.heartbeat(0).write_text(f"1 {step}\n")
    checkpoint = run.checkpoint(100)
    checkpoint.root.mkdir()
    checkpoint.state.write_text("{}")
    with open(run.metrics, "w") as file:
        for at in range(20, step, 20):
            file.write(json.dumps({"step": at, "kind": "train", "loss": 2.0 - at / 1000,
                                   "images_per_s": 640.0}) + "\n")
            if at == 40:
                file.write(json.dumps({"step": at, "kind": "val", "top1": 51.5}) + "\n")
        file.write('{"step": 999, "kind": "tra')
    return run


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
