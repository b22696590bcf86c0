"""The degradation experiment of He et al. 2015, sec. 4.2, on CIFAR-10, with the command alone.

    python -m tests.proofs.degradation data/cifar10 runs/degradation docs/degradation.png

Trains plain-20, plain-56, ResNet-20 and ResNet-56 for 8,000 iterations of 128 images (an eighth of
the published schedule, milestones likewise) and draws their curves. The first twentieth warms up to
the rate: without it ResNet-56's loss jumps to 5 in the first steps, and at step 5,000 it is still
behind ResNet-20 (RESULTS.md). A plain and a residual network train at a time, one core each.
Killed, the same command goes on; `--allow code` where the code has changed in between. About 2
hours on 2 cores with bf16 instructions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "cifar10"
PANELS = (("plain20", "plain56"), ("resnet20", "resnet56"))
COLOURS = {"20": "tab:olive", "56": "tab:red"}


def command(model: str, data: str, runs: Path, steps: int) -> list[str]:
    return ["resnet-dist", "train", str(RECIPES / f"{model}.yaml"), f"data={data}",
            f"runs={runs}", f"steps={steps}",
            f"schedule.milestones=[{steps // 2},{steps * 3 // 4}]",
            f"schedule.warmup_steps={steps // 20}", "eval.every_steps=1000",
            "checkpoint.every_steps=500", "launch.cpus_per_rank=1", "threads=1"]


def finished(run: RunPaths, steps: int) -> bool:
    return run.metrics.exists() and any(line["step"] == steps
                                        for line in read_lines(run.metrics, "val"))


def train(models: tuple[str, ...], asked: argparse.Namespace) -> int:
    """The deepest network first; the exit code of the first that fails, or 0."""
    for model in reversed(models):
        if finished(RunPaths(asked.runs / f"{asked.prefix}{model}"), asked.steps):
            continue
        done = subprocess.run([*command(model, asked.data, asked.runs, asked.steps),
                               f"name={asked.prefix}{model}", *asked.settings,
                               *(["--allow", asked.allow] if asked.allow else [])])
        if done.returncode:
            return done.returncode
    return 0


def smooth(values: list[float], window: int) -> list[float]:
    return [sum(values[max(0, i - window + 1):i + 1]) / len(values[max(0, i - window + 1):i + 1])
            for i in range(len(values))]


def draw(runs: Path, prefix: str, picture: Path) -> dict[str, tuple[float, float]]:
    """Draw training (thin) and test error (bold), as the paper's figure 6 does.

    Returns: by model, the mean training error of the last 500 steps and the last test error, in
    percent.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    last = {}
    for axis, models in zip(axes, PANELS, strict=True):
        for model in models:
            path = RunPaths(runs / f"{prefix}{model}").metrics
            train, val = read_lines(path, "train"), read_lines(path, "val")
            colour = COLOURS[model[-2:]]
            errors = [100 - line["top1"] for line in train]
            axis.plot([line["step"] for line in train], smooth(errors, 10), color=colour,
                      linewidth=0.8)
            axis.plot([line["step"] for line in val], [100 - line["top1"] for line in val],
                      color=colour, linewidth=2, label=model)
            recent = [error for line, error in zip(train, errors, strict=True)
                      if line["step"] > train[-1]["step"] - 500]
            last[model] = (sum(recent) / len(recent), 100 - val[-1]["top1"])
        axis.set_xlabel("iteration")
        axis.set_ylim(5, 60)
        axis.grid(alpha=0.3)
        axis.legend(title="bold: test, thin: training")
    axes[0].set_ylabel("error, %")
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    return last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--prefix", default="", help="of the runs' names")
    parser.add_argument("--allow", help="kinds of difference to go on with, as of resume")
    parser.add_argument("--draw", action="store_true", help="train nothing, draw what there is")
    asked = parser.parse_args()
    if not asked.draw:
        with ThreadPoolExecutor(len(PANELS)) as lanes:
            codes = list(lanes.map(lambda models: train(models, asked), PANELS))
        if any(codes):  # a signal's is negative
            return next(code for code in codes if code)
    last = draw(asked.runs, asked.prefix, asked.picture)
    for model, pair in last.items():
        print(f"{model:10} training error {pair[0]:5.2f}%  test error {pair[1]:5.2f}%")
    training, test = ({model: pair[i] for model, pair in last.items()} for i in (0, 1))
    shown = (training["plain56"] > training["plain20"] and test["plain56"] > test["plain20"]
             and training["resnet56"] < training["resnet20"]
             and test["resnet56"] < test["resnet20"])
    print("deeper is worse without shortcuts and better with them:", "yes" if shown else "NO")
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
