"""Do both engines, and exact mode, reach the same accuracy? 8 epochs of CIFAR-10, 3 seeds each.

    python -m tests.proofs.engines data/cifar10 runs/engines

Trains ResNet-20 for 3,125 iterations of 128 images with each variant on two ranks and prints mean
and standard deviation of the test error, and the images a second. Killed, the same command goes on;
`--allow code` where the code has changed in between. About 80 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines
from tests.proofs.degradation import finished

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "cifar10" / "resnet20.yaml"
STEPS = 3125  # eight epochs of 50,000 images, 128 at a time
VARIANTS = {"fast": [], "deepspeed": ["engine=deepspeed", "zero_stage=1"], "exact": ["mode=exact"]}
SEEDS = (0, 1, 2)


def train(name: str, seed: int, asked: argparse.Namespace, overrides: list[str]) -> int:
    """The exit code of one run."""
    return subprocess.run([
        "resnet-dist", "train", str(RECIPE), f"data={asked.data}", f"runs={asked.runs}",
        f"name={name}", f"seed={seed}", f"steps={STEPS}", "schedule.milestones=[1562,2343]",
        "eval.every_steps=1562", "launch.ranks_per_node=2", "launch.cpus_per_rank=1", *overrides,
        *asked.settings,
        *(["--allow", asked.allow] if asked.allow else [])]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("runs", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--allow", help="kinds of difference to go on with, as of resume")
    asked = parser.parse_args()
    errors: dict[str, list[float]] = {}
    for seed in SEEDS:
        for variant, overrides in VARIANTS.items():
            name = f"{variant}-{seed}"
            if not finished(RunPaths(asked.runs / name), STEPS):
                code = train(name, seed, asked, overrides)
                if code:
                    return code
            metrics = RunPaths(asked.runs / name).metrics
            errors.setdefault(variant, []).append(100 - read_lines(metrics, "val")[-1]["top1"])
            speed = statistics.median(line["images_per_s"] for line in read_lines(metrics, "train"))
            print(f"{name}: test error {errors[variant][-1]:.2f}%, {speed:.0f} images/s",
                  flush=True)
    for variant, found in errors.items():
        print(f"{variant:10} {statistics.mean(found):.2f}% +- {statistics.stdev(found):.2f}")
    # Three seeds know their spread badly; twice the pooled deviation of a difference of means.
    pooled = statistics.mean(statistics.variance(found) for found in errors.values()) ** 0.5
    means = [statistics.mean(found) for found in errors.values()]
    apart = max(means) - min(means)
    limit = 2 * pooled * (2 / len(SEEDS)) ** 0.5
    print(f"largest difference of means {apart:.2f}, noise {limit:.2f}")
    return 0 if apart <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
