"""Hours of loading in minutes: random stops and restarts, memory flat, no thread left.

`SOAK_S` sets the seconds, 1200 unless told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.samples import jpeg_sample, write_dataset

SOAK = """
import gc, json, random, sys, threading, time
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.loader import EvalLoader, TrainLoader

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

root, seconds = sys.argv[1], float(sys.argv[2])
draw = random.Random(0)
kinds = [AugmentConfig(name="random_resized_crop", size=128, pca=0.1),
         AugmentConfig(name="scale_crop", size=64, min_side=64, max_side=140, rand_ops=2),
         AugmentConfig(name="random_resized_crop", size=96, erase=0.5, sizes=((0, 64), (1, 96)))]
memory, restarts, batches = [], 0, 0
start = time.monotonic()
while time.monotonic() - start < seconds:
    with TrainLoader(root, "train", draw.choice(kinds), seed=draw.randrange(99), batch_size=64,
                     threads=2, prefetch=draw.randrange(1, 5),
                     first_step=draw.randrange(10_000)) as loader:
        for batch, _ in zip(loader, range(draw.randrange(1, 12))):
            batches += 1
    with EvalLoader(root, "val", resize=120, size=96, batch_size=7, threads=2) as loader:
        for batch, _ in zip(loader, range(draw.randrange(1, 4))):
            pass
    assert threading.active_count() == 1, threading.enumerate()
    restarts += 1
    memory.append(resident())
print(json.dumps({"restarts": restarts, "batches": batches, "memory": memory}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_through_random_stops_and_restarts(tmp_path: Path):
    samples = [jpeg_sample(i, 0, 180 + 7 * (i % 9), 240) for i in range(150)]
    root = write_dataset(tmp_path / "d", {"train": [samples[:70], samples[70:]],
                                          "val": [samples[:30]]})
    seconds = os.environ.get("SOAK_S", "1200")
    done = subprocess.run([sys.executable, "-c", SOAK, str(root), seconds], capture_output=True,
                          text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    memory = result["memory"]
    tenth = max(1, len(memory) // 10)
    early, late = max(memory[tenth:3 * tenth]), max(memory[-tenth:])
    assert result["restarts"] > 20
    assert late < 1.02 * early, (early, late, memory[::tenth])
