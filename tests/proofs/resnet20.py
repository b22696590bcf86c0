"""ResNet-20 on CIFAR-10 in full, as a SLURM job that is preempted on the way: He et al. 2015, 4.2.

    python -m tests.proofs.resnet20 data/cifar10 runs/proofs

Starts the local SLURM where it is not up, submits `configs/cifar10/resnet20.yaml` to two nodes of
one core each, and at the steps of `--preempt` sends a job of a higher tier that wants all nodes.
Then it prints the error beside the paper's. 2.3 hours on 2 cores with bf16 instructions.

Everything it knows is in the run directory: this command, and the run, may end at any moment, with
the machine, too. The same command goes on, and resumes a run whose SLURM is gone.
`slurm/local_cluster.sh down` ends the cluster, which is left up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from launcher.journal.events import Event, read_events, record
from launcher.watch.status import RunStatus, statuses
from resnet_dist.config.load import load_frozen
from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "cifar10" / "resnet20.yaml"
PAPER = 8.75  # percent, table 6
LOOK_S = 5.0
LOST_LOOKS = 6  # in a row without the job: between two incarnations squeue may miss one


def join_slurm() -> None:
    """Start the local cluster where it is not up, and let this process talk to it."""
    script = str(ROOT / "slurm" / "local_cluster.sh")
    subprocess.run(["bash", script, "up"], check=True)
    said = subprocess.run(["bash", "-c", f'eval "$(bash {script} env)"; echo "$SLURM_CONF"'],
                          check=True, capture_output=True, text=True).stdout
    os.environ["SLURM_CONF"] = said.strip()


def command(*words: object) -> None:
    """`resnet-dist WORDS...`. Raises: SystemExit where it refuses; it has said why."""
    done = subprocess.run([sys.executable, "-m", "launcher.cli", *map(str, words)], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def start(run: RunPaths, data: Path, steps: int, allow: str | None) -> None:
    """Submit the run, or resume it where nothing of it is left in SLURM."""
    if not run.config.exists():
        milestones = f"schedule.milestones=[{steps // 2},{steps * 3 // 4}]"
        command("submit", RECIPE, f"data={data}", f"runs={run.root.parent}", f"name={run.name}",
                f"steps={steps}", milestones, "cluster=local", "launch.nodes=2",
                "launch.time_minutes=1440")
        return
    for _ in range(LOST_LOOKS):
        status = look(run)
        if status.over or in_slurm(run, status.job):
            break
        time.sleep(LOOK_S)
    else:
        record(run, "stopped", cause="its job is gone with its SLURM", step=status.step)
        status = look(run)
    if status.over and status.state != "finished":
        moved = load_frozen(run.config).data.path != str(data)
        command("resume", run.name, *([f"data={data}"] if moved else []), "--runs",
                run.root.parent, *(["--allow", allow] if allow else []))


def look(run: RunPaths) -> RunStatus:
    return statuses([run])[0][0]


def in_slurm(run: RunPaths, job: str) -> bool:
    """Whether SLURM has the run's job; a new cluster counts its jobs from one again."""
    done = subprocess.run(["squeue", "--noheader", "--format=%i %j"], capture_output=True,
                          text=True)
    return bool(done.returncode) or f"{job} {run.name}" in done.stdout.splitlines()


def preemptions(events: list[Event]) -> list[Event]:
    """SLURM requeued the job by itself: nothing but a higher tier makes it do so here."""
    return [event for event in events
            if event["event"] == "requeued" and event["how"] == "by SLURM"]


def watch(run: RunPaths, targets: list[int]) -> None:
    """Until the run is over; preempts it on the way. Raises: SystemExit where it failed."""
    sent = len(preemptions(read_events(run)))
    while not (status := look(run)).over:
        happened = len(preemptions(read_events(run)))
        due = status.state == "running" and happened < len(targets)
        if due and status.step >= targets[happened] and sent <= happened:
            print(f"preempted at step {status.step}", flush=True)
            subprocess.run(["sbatch", "--partition=high", "--nodes=4", "--cpus-per-task=2",
                            "--output=/dev/null", "--wrap=sleep 20"], check=True,
                           stdout=subprocess.DEVNULL)
            sent = happened + 1
        time.sleep(LOOK_S)
    if status.state != "finished":
        raise SystemExit(f"{run.name} is {status.state}: {status.cause}")


def report(run: RunPaths) -> bool:
    """Print what became of it; whether it was preempted at least three times."""
    status, events = look(run), read_events(run)
    train, val = read_lines(run.metrics, "train"), read_lines(run.metrics, "val")
    speed = statistics.median(line["images_per_s"] for line in train)
    times = len(preemptions(events))
    submitted = sum(event["event"] == "submitted" for event in events)
    print(f"{run.name}: {status.steps:,} iterations, test error {100 - val[-1]['top1']:.2f}% "
          f"(lowest on the way {100 - max(line['top1'] for line in val):.2f}%); "
          f"the paper, on images that were not compressed: {PAPER}%")
    print(f"preempted {times} times, submitted {submitted} times, restarted {status.restarts} "
          f"times, {status.redone_steps} iterations redone, {speed:.0f} images/s")
    return times >= 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--name", default="resnet20-preempted")
    parser.add_argument("--steps", type=int, default=64_000)
    parser.add_argument("--preempt", default="9000,27000,45000", help="steps, with commas")
    parser.add_argument("--allow", help="kinds of difference to go on with, as of resume")
    asked = parser.parse_args()
    run = RunPaths((asked.runs / asked.name).absolute())
    join_slurm()
    start(run, asked.data.absolute(), asked.steps, asked.allow)
    watch(run, [int(step) for step in asked.preempt.split(",")])
    return 0 if report(run) else 1


if __name__ == "__main__":
    sys.exit(main())
