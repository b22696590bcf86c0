"""What tensors give back is used again without asking the kernel for fresh pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "settled":
    from resnet_dist.config.load import config_from_dict
    from resnet_dist.ranks.distributed import init_world
    init_world(config_from_dict({"name": "x", "device": "cpu", "threads": 1}))

def round():
    kept = [torch.ones(size << 18) for size in (48, 3, 17)]  # MiB of float32
    del kept

for _ in range(3):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("settled", [True, False])
def test_a_rank_pages_its_activations_in_once(settled: bool,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(key, raising=False)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "settled" if settled else "as it comes"],
                          capture_output=True, text=True, check=True)
    faults, pages = int(done.stdout), 5 * 68 * 256  # of 4 KiB
    if settled:
        assert faults < pages / 100
    else:  # else this proves nothing on this machine
        assert faults > pages / 4
