"""A rank's sign of life, while one incarnation takes over from another."""

import subprocess
import sys

BEAT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from resnet_dist.run.paths import RunPaths
from resnet_dist.train import Heart
heart = Heart(RunPaths(Path(sys.argv[1])), SimpleNamespace(rank=0))
print("ready", flush=True)
sys.stdin.readline()
for step in range(3000):
    heart._last = float("-inf")
    heart.beat(step)
"""


def test_an_incarnation_and_its_successor_may_beat_at_once(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", BEAT, str(tmp_path)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for _ in range(2)]
    for each in both:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in both:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in both:
        said = each.communicate(timeout=60)[1]
        assert each.returncode == 0, said
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank_0000"]
