"""The whole path on a real SLURM, in the commands that a user types: two nodes, one rank each."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnet_dist.run.paths import RunPaths
from resnet_dist.watch.metrics import read_lines
from tests.conftest import ROOT, Cli

RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
STEPS = 120
SETTINGS = (f"steps={STEPS}", "batch_size=32", "bn_batch=8", "launch.nodes=2", "threads=1",
            "launch.ranks_per_node=1", "launch.cpus_per_rank=1", "checkpoint.every_steps=30",
            "log.every_steps=5", "eval.every_steps=1000", "schedule.warmup_steps=10")


def submit(cli: Cli, digits: Path, folder: Path, name: str) -> tuple[RunPaths, str]:
    done = cli("submit", RECIPE, f"data={digits}", f"name={name}", *SETTINGS, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return RunPaths(Path(answer["run"])), answer["job"]


def status(cli: Cli, run: RunPaths) -> dict[str, Any]:
    done = cli("status", run.name, "--runs", run.root.parent, "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wait(cli: Cli, run: RunPaths, until: Any, limit_s: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + limit_s
    while True:
        now = status(cli, run)
        if until(now):
            return now
        assert time.monotonic() < deadline, (now, logs_of(run))
        assert now["state"] != "failed", (now, logs_of(run))
        time.sleep(0.3)


def logs_of(run: RunPaths) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(run.logs.glob("*.log")))


def state_hashes(run: RunPaths) -> dict[str, str]:
    files = json.loads(run.checkpoint(STEPS).state.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


@pytest.mark.timeout(600)
def test_requeue_and_usr2_continue_at_the_very_step_and_change_no_bit(
        slurm: Any, cli: Cli, digits: Path, tmp_path: Path) -> None:
    whole, _ = submit(cli, digits, tmp_path, "whole")
    wait(cli, whole, lambda now: now["state"] == "finished")
    run, job = submit(cli, digits, tmp_path, "disturbed")
    for step, command in ((8, ["scontrol", "requeue", job]),
                          (38, ["scancel", "--signal=USR2", job])):
        wait(cli, run, lambda now, step=step: now["state"] == "running" and now["step"] >= step)
        subprocess.run(command, check=True)
    ended = wait(cli, run, lambda now: now["state"] == "finished")
    assert ended["redone_steps"] == 0, "a signal with grace must cost no iteration"
    assert state_hashes(run) == state_hashes(whole)
    curves = [[(line["step"], line["loss"], line["top1"]) for line in
               read_lines(each.metrics, "train")] for each in (whole, run)]
    assert curves[0] == curves[1]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(5, STEPS + 1, 5))
    judged = cli("eval", run.name, "--runs", tmp_path / "runs", "--json")
    assert judged.returncode == 0, judged.stderr
    top1 = json.loads(judged.stdout)["top1"]
    assert top1 == pytest.approx(read_lines(run.metrics, "val")[-1]["top1"], abs=0.6)
