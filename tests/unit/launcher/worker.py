# ruff: noqa: T201
"""A worker with the training loop's manners and none of its cost; standard library alone.

It makes a step every 20 ms, beats, commits a checkpoint every 10 steps, and leaves with 75 after a
stop signal. `stand_in.json` in the run directory says how many steps there are, and what goes wrong
in which attempt: {"2": {"rank": 0, "step": 15, "do": "raise"}}; "*" is every attempt, and what goes
wrong may be a list, with something for each rank.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_S = 0.02
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def work(root: Path) -> int:
    rank, attempt = int(os.environ["RANK"]), os.environ["RESNET_DIST_ATTEMPT"]
    plan = json.loads((root / "stand_in.json").read_text())
    assert int(os.environ["WORLD_SIZE"]) == plan["world"]
    asked: list[int] = []
    # As in the training loop, signals are ignored again when the work is done: the interpreter's
    # own end would otherwise make them deadly.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS])
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: asked.append(number))
    fault = plan["faults"].get(attempt, plan["faults"].get("*", {}))
    faults = fault if isinstance(fault, list) else [fault]
    fault = next((each for each in faults if each.get("rank") == rank), {})
    step = max((int(path.parent.name.removeprefix("step_"))
                for path in (root / "checkpoints").glob("step_*/state.json")), default=0)
    print(f"rank {rank} of attempt {attempt} starts at step {step}", flush=True)
    while step < plan["steps"]:
        time.sleep(STEP_S)
        step += 1
        temporary = root / "heartbeats" / f".{rank}.{os.getpid()}.tmp"
        temporary.write_text(f"{attempt} {step}\n")
        temporary.rename(root / "heartbeats" / f"rank_{rank:04d}")
        if step == fault.get("step"):
            misbehave(fault["do"], step)
        stop = bool(asked)
        if rank == 0 and (stop or step % 10 == 0 or step == plan["steps"]):
            commit(root / "checkpoints" / f"step_{step:08d}", step)
        if stop:
            return 75
    return 0


def commit(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": step}))


def misbehave(what: str, step: int) -> None:
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ValueError("no such luck")
        case "raise late":
            time.sleep(1.5)
            raise ValueError("no such luck")
        case "lose peer":
            raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:51858")
        case "bad input":
            print("batch_size = 7: must divide", file=sys.stderr)
            sys.exit(2)
        case "broken node":
            print("AcceleratorError: CUDA error: uncorrectable ECC error", file=sys.stderr)
            sys.exit(74)
        case "diverge":
            print(f"step {step}: loss is not finite", file=sys.stderr)
            sys.exit(3)
        case "leave":
            sys.exit(75)
        case "hang":
            time.sleep(1000)
        case "deaf":
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
