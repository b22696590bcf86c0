"""What a person at the terminal waits for: `--help`, and `status` of 500 runs of 600,000 steps.

    python -m tests.proofs.terminal [--rounds 5]

Wall time, on a quiet machine; processor time, of children too, on any.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.journal.events import Process, record
from tests.unit.launcher.stand_in import make_run

RUNS, STEPS, ATTEMPTS = 500, 600_000, 20


def make_runs(folder: Path) -> None:
    """Runs as jobs of days leave them: logs of 1 MB, twenty attempts, a checkpoint."""
    run, config = make_run(folder / "run000", steps=STEPS)
    record(run, "submitted", where="slurm", nodes=1, steps=STEPS, batch_size=config.batch_size)
    record(run, "queued", job="77")
    record(run, "started", job="77", restart=0, where="slurm", nodes=["n1"],
           **Process.this().facts)
    for attempt in range(1, ATTEMPTS + 1):
        record(run, "attempt", attempt=attempt, step=attempt * 1000, reached=attempt * 1000,
               ranks=2, pids=[11, 12])
    run.heartbeat(0).write_text(f"{ATTEMPTS} {STEPS - 100}\n")
    run.checkpoint(STEPS - 1000).root.mkdir()
    run.checkpoint(STEPS - 1000).state.write_text("{}")
    with open(run.metrics, "w") as file:
        for step in range(100, STEPS, 100):
            kinds = ["train"] if step % 10_000 else ["train", "val"]
            for kind in kinds:
                file.write(json.dumps({"step": step, "kind": kind, "time": 0.0, "loss": 2.0,
                                       "top1": 51.5, "images_per_s": 640.0, "lr": 0.1}) + "\n")
    for number in range(1, RUNS):
        shutil.copytree(run.root, folder / f"run{number:03d}")


def spent(words: list[str], folder: Path) -> tuple[float, float]:
    """Wall and processor time of one call."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "150"})
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    command = str(Path(sys.executable).with_name("resnet-dist"))
    with tempfile.TemporaryDirectory() as scratch:
        make_runs(Path(scratch) / "runs")
        print("| command | wall, median (s) | slowest (s) | processor (s) |\n|---|---|---|---|")
        for words in (["--help"], ["submit", "--help"], ["status"], ["status", "--json"],
                      ["status", "run007"]):
            walls, busy = zip(*(spent([command, *words], Path(scratch)) for _ in range(rounds)),
                              strict=True)
            print(f"| `{' '.join(words)}` | {statistics.median(walls):.2f} | {max(walls):.2f} | "
                  f"{statistics.median(busy):.2f} |")


if __name__ == "__main__":
    main()
