# ruff: noqa: T201
"""A worker with the training loop's manners and none of its cost, and a supervisor around it.

    launcher_stand_in.py work RUN_DIR            one rank
    launcher_stand_in.py supervise RUN_DIR PLACE the supervisor of a node; PLACE is JSON

The worker makes a step every 20 ms, beats, commits a checkpoint every 10 steps, and leaves with 75
after a stop signal. `faults.json` in the run directory says what goes wrong in which attempt:
{"2": {"rank": 0, "step": 15, "do": "raise"}}; "*" is every attempt.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

from launcher.job import TrainJob
from launcher.supervisor import Place, Supervisor, log_to_stderr
from launcher.workers import STOP_SIGNALS
from resnet_dist.config import Config, config_from_dict, dump_config, load_frozen
from resnet_dist.paths import RunPaths

STEP_S = 0.02


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
    (root / "faults.json").write_text(json.dumps(faults or {}))
    return run, config


def work(run: RunPaths) -> int:
    rank, attempt = int(os.environ["RANK"]), os.environ["RESNET_DIST_ATTEMPT"]
    config = load_frozen(run.config)
    assert int(os.environ["WORLD_SIZE"]) == config.world
    asked: list[int] = []
    # As in the training loop, signals are ignored again when the work is done: the interpreter's
    # own end would otherwise make them deadly.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS])
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: asked.append(number))
    faults = json.loads((run.root / "faults.json").read_text())
    fault = faults.get(attempt, faults.get("*", {}))
    if fault.get("rank") != rank:
        fault = {}
    step = max((paths.step for paths in run.checkpoints_on_disk() if paths.state.exists()),
               default=0)
    print(f"rank {rank} of attempt {attempt} starts at step {step}", flush=True)
    while step < config.steps:
        time.sleep(STEP_S)
        step += 1
        temporary = run.heartbeats / f".{rank}.tmp"
        temporary.write_text(f"{attempt} {step}\n")
        temporary.rename(run.heartbeat(rank))
        if step == fault.get("step"):
            misbehave(fault["do"])
        stop = bool(asked)
        if rank == 0 and (stop or step % 10 == 0 or step == config.steps):
            commit(run, step)
        if stop:
            return 75
    return 0


def commit(run: RunPaths, step: int) -> None:
    paths = run.checkpoint(step)
    paths.root.mkdir(exist_ok=True)
    paths.state.write_text(json.dumps({"step": step}))


def misbehave(what: str) -> None:
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ValueError("no such luck")
        case "bad input":
            print("batch_size = 7: must divide", file=sys.stderr)
            sys.exit(2)
        case "diverge":
            print("step 12: loss is not finite", file=sys.stderr)
            sys.exit(3)
        case "hang":
            time.sleep(1000)
        case "deaf":
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def supervise(run: RunPaths, place: dict) -> int:
    place["names"] = tuple(place.get("names", ("127.0.0.1",)))
    log_to_stderr(place.get("node", 0))
    command = [sys.executable, __file__, "work", str(run.root)]
    outcome = Supervisor(run, load_frozen(run.config), Place(**place), command=command).run()
    print(json.dumps([outcome.kind, outcome.cause]))
    return 0


class StandInJob(TrainJob):
    """The job that SLURM runs, around the stand-in worker."""

    def supervisor(self, run: RunPaths, config: Config, place: Place) -> Supervisor:
        return Supervisor(run, config, place,
                          command=[sys.executable, __file__, "work", str(run.root)])


if __name__ == "__main__":
    folder = RunPaths(Path(sys.argv[2]))
    sys.exit(work(folder) if sys.argv[1] == "work" else supervise(folder, json.loads(sys.argv[3])))
