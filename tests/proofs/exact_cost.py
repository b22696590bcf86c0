"""What exact mode costs: images/s beside fast mode's, everything else alike.

    python -m tests.proofs.exact_cost data/cifar10 runs/exact-cost

ResNet-20 with mixup, stochastic depth, averaged weights and label smoothing, 128 images a step in
groups of 32, one thread a rank, at one and two ranks; the two modes take turns. About 5 minutes on
2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "cifar10" / "resnet20.yaml"
SETTINGS = ("bn_batch=32", "threads=1", "launch.cpus_per_rank=1", "schedule.milestones=[]",
            "augment.mixup=0.2", "model.stochastic_depth=0.2", "ema.decay=0.999",
            "loss.label_smoothing=0.1", "log.panels_every_steps=0", "eval.every_steps=100000",
            "checkpoint.every_steps=100000")


def speed(data: str, run: RunPaths, steps: int, *overrides: str) -> list[float]:
    """Images/s of the logged windows, the first one left out. Raises: SystemExit."""
    done = subprocess.run(["resnet-dist", "train", str(RECIPE), f"data={data}", f"steps={steps}",
                           f"runs={run.root.parent}", f"name={run.name}", *SETTINGS, *overrides])
    if done.returncode:
        raise SystemExit(done.returncode)
    return [line["images_per_s"] for line in read_lines(run.metrics, "train")][1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("runs", type=Path, help="folder; the runs in it must be new")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    asked = parser.parse_args()
    seen: dict[tuple[int, str], list[float]] = {}
    for turn in range(asked.rounds):
        for ranks in (1, 2):
            for mode in ("fast", "exact"):
                run = RunPaths(asked.runs / f"{mode}-{ranks}-{turn}")
                seen.setdefault((ranks, mode), []).extend(speed(
                    asked.data, run, asked.steps, f"mode={mode}", f"launch.ranks_per_node={ranks}"))
    for ranks in (1, 2):
        fast, exact = (statistics.median(seen[ranks, mode]) for mode in ("fast", "exact"))
        print(f"{ranks} ranks: fast {fast:.0f} images/s, exact {exact:.0f}, "
              f"{100 * exact / fast:.0f}% of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
