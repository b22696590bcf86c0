"""The promises on whole runs: real worker processes over gloo, real kills, real files."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.frozen.freeze import create_run, rewrite_config
from resnet_dist.config.schema import Config
from resnet_dist.config.load import config_from_dict, config_to_dict, load_frozen
from resnet_dist.watch.metrics import read_lines
from resnet_dist.run.paths import RunPaths
from resnet_dist.run.rollback import Rollback, add_rollback

STEPS = 30


def config_of(digits: Path, tmp_path: Path, name: str, **changes: object) -> Config:
    return config_from_dict({
        "name": name, "runs": str(tmp_path), "data": str(digits), "steps": STEPS,
        "batch_size": 32, "bn_batch": 8, "model": "resnet20", "threads": 1, "device": "cpu",
        "augment": {"name": "pad_crop", "size": 32, "flip": False},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "checkpoint": {"every_steps": 10, "keep_last": 2}, "log": {"every_steps": 4},
        "eval": {"every_steps": 1000, "resize": None, "size": 32}, **changes})


def start(run: RunPaths, world: int) -> list["subprocess.Popen[bytes]"]:
    """All ranks of one incarnation, as a launcher starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.rmtree(run.heartbeats, ignore_errors=True)
    ranks = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
               "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port)}
        with open(run.rank_log(rank), "ab") as log:
            ranks.append(subprocess.Popen([sys.executable, "-m", "resnet_dist.train", run.root],
                                          env=env, stdout=log, stderr=log))
    return ranks


def finish(run: RunPaths, world: int) -> None:
    for process in start(run, world):
        assert process.wait(timeout=240) == 0, run.rank_log(0).read_text()[-3000:]


def reached(run: RunPaths) -> int:
    try:
        return int(run.heartbeat(0).read_text().split()[1])
    except FileNotFoundError:
        return 0


def wait_for_step(run: RunPaths, step: int) -> None:
    deadline = time.monotonic() + 120
    while reached(run) < step:
        assert time.monotonic() < deadline, run.rank_log(0).read_text()[-3000:]
        time.sleep(0.01)


def hashes(run: RunPaths, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of weights with BatchNorm statistics, optimizer, and per-rank state."""
    files = json.loads(run.checkpoint(step).state.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def curve(run: RunPaths) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["top1"]) for line in read_lines(run.metrics, "train")]


def test_sigkill_and_resume_equal_the_uninterrupted_run(digits: Path, tmp_path: Path) -> None:
    whole = create_run(config_of(digits, tmp_path, "whole"))
    finish(whole, 2)
    killed = create_run(config_of(digits, tmp_path, "killed"))
    for _ in range(2):
        ranks = start(killed, 2)
        wait_for_step(killed, random.randint(11, 25))
        victim, peer = random.sample(ranks, 2)
        victim.send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert peer.wait(timeout=60) not in (0, 75), "a peer went on without the killed rank"
        assert time.monotonic() - began < 10
    finish(killed, 2)
    assert hashes(killed) == hashes(whole)
    assert curve(killed) == curve(whole)


def test_schedules_that_watch_the_error_are_as_exact_through_a_kill(
        digits: Path, tmp_path: Path) -> None:
    """0.01 until the training error is below 95%, halved at every evaluation without a gain."""
    watching = {"name": "plateau", "patience": 1, "gain": 100, "factor": 0.5, "warmup_start": 0.1,
                "warmup_until_error": 95}
    evals = {"every_steps": 6, "resize": None, "size": 32}
    whole, killed = (create_run(config_of(digits, tmp_path, name, schedule=watching, eval=evals))
                     for name in ("whole", "killed"))
    finish(whole, 1)
    rank = start(killed, 1)[0]
    wait_for_step(killed, 14)
    rank.kill()
    rank.wait()
    finish(killed, 1)
    assert "resumed at step 10" in killed.rank_log(0).read_text()
    rates = [{line["step"]: line["lr"] for line in read_lines(run.metrics, "train")}
             for run in (whole, killed)]
    assert rates[0] == rates[1]
    # A gain of 100 points is never seen: the first evaluation is the best, the others drop.
    assert rates[0] == pytest.approx({4: 0.01, 8: 0.1, 12: 0.1, 16: 0.05, 20: 0.025, 24: 0.025,
                                      28: 0.0125, 30: 0.0125})
    assert hashes(killed) == hashes(whole)


def test_sigterm_saves_the_very_step_and_resume_is_exact(digits: Path, tmp_path: Path) -> None:
    whole = create_run(config_of(digits, tmp_path, "whole"))
    finish(whole, 2)
    stopped = create_run(config_of(digits, tmp_path, "stopped"))
    ranks = start(stopped, 2)
    wait_for_step(stopped, 13)
    ranks[1].send_signal(signal.SIGUSR2)  # one rank alone is told
    assert [rank.wait(timeout=60) for rank in ranks] == [75, 75]
    saved_at = stopped.checkpoints_on_disk()[0].step
    assert saved_at % 10, "the step of the signal must not be a regular checkpoint's"
    finish(stopped, 2)
    assert f"resumed at step {saved_at}" in stopped.rank_log(0).read_text()
    assert hashes(stopped) == hashes(whole)
    assert curve(stopped) == curve(whole)


def test_exact_mode_gives_the_same_bits_at_any_world_and_through_changes(
        digits: Path, tmp_path: Path) -> None:
    def exact(name: str, steps: int) -> Config:
        return config_of(digits, tmp_path, name, mode="exact", steps=steps,
                         schedule={"milestones": [30]}, checkpoint={"every_steps": 50})

    def state(run: RunPaths) -> tuple[str, str, list[tuple[int, float, float]]]:
        files = hashes(run, 50)
        return files["model.safetensors"], files["optimizer.safetensors"], curve(run)

    found = {}
    for world in (1, 2, 4):
        run = create_run(exact(f"exact{world}", 50))
        finish(run, world)
        found[world] = state(run)
    run = create_run(exact("changing", 15))
    for world, steps in ((4, 15), (1, 32), (2, 50)):
        config = load_frozen(run.config)
        rewrite_config(run, config_from_dict({**config_to_dict(config), "steps": steps}))
        finish(run, world)
    assert found[1] == found[2] == found[4]
    assert state(run)[:2] == found[1][:2]


def test_statistics_refreshed_after_training_survive_a_kill_and_change_nothing_else(
        digits: Path, tmp_path: Path) -> None:
    plain = create_run(config_of(digits, tmp_path, "plain", steps=12))
    finish(plain, 2)
    refreshed = create_run(config_of(digits, tmp_path, "refreshed", steps=12, bn_refresh_steps=5))
    ranks = start(refreshed, 2)
    wait_for_step(refreshed, 10)
    for rank in ranks:
        rank.kill()
        rank.wait()
    finish(refreshed, 2)
    kept, replaced = (load_file(run.checkpoint(12).model) for run in (plain, refreshed))
    changed = {name.rpartition(".")[2] for name in kept
               if not torch.equal(kept[name], replaced[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    again = create_run(config_of(digits, tmp_path, "again", steps=12, bn_refresh_steps=5))
    finish(again, 2)
    assert hashes(again, 12) == hashes(refreshed, 12)


def test_no_start_over_when_every_checkpoint_is_damaged(digits: Path, tmp_path: Path) -> None:
    run = create_run(config_of(digits, tmp_path, "damaged", steps=10))
    finish(run, 1)
    for paths in run.checkpoints_on_disk():
        content = bytearray(paths.model.read_bytes())
        content[len(content) // 2] ^= 1
        paths.model.write_bytes(content)
    rank = start(run, 1)[0]
    assert rank.wait(timeout=60) == 2
    assert "no valid checkpoint" in run.rank_log(0).read_text()
    assert run.checkpoints_on_disk(), "nothing may be deleted"


def test_a_diverged_run_commits_nothing_and_says_so(digits: Path, tmp_path: Path) -> None:
    run = create_run(config_of(digits, tmp_path, "diverged", optimizer={"lr": 1e30},
                               schedule={"name": "constant"}))
    rank = start(run, 1)[0]
    assert rank.wait(timeout=60) == 3
    assert "not finite" in run.rank_log(0).read_text()
    assert not run.checkpoints_on_disk()


@pytest.mark.parametrize("world", [3])
def test_a_world_that_does_not_divide_the_batch_is_refused(
        digits: Path, tmp_path: Path, world: int) -> None:
    run = create_run(config_of(digits, tmp_path, "thirds"))
    ranks = start(run, world)
    assert [rank.wait(timeout=60) for rank in ranks] == [2] * world
    assert "must divide batch_size / bn_batch = 4" in run.rank_log(0).read_text()


def test_an_eased_rate_after_a_divergence_is_part_of_the_run(digits: Path, tmp_path: Path) -> None:
    """Two runs that went back alike are equal to the bit, one of them killed on the way."""
    def back(name: str) -> RunPaths:
        run = create_run(config_of(digits, tmp_path, name))
        add_rollback(run, Rollback(diverged_at=25, to=0, lr_factor=0.5, until=27))
        return run

    plain, eased, killed = create_run(config_of(digits, tmp_path, "plain")), back("e"), back("k")
    finish(plain, 1)
    finish(eased, 1)
    rank = start(killed, 1)[0]
    wait_for_step(killed, 14)
    rank.kill()
    rank.wait()
    finish(killed, 1)
    assert hashes(killed) == hashes(eased) != hashes(plain)
    rates = [{line["step"]: line["lr"] for line in read_lines(run.metrics, "train")}
             for run in (plain, eased)]
    assert {step: rates[1][step] / rates[0][step] for step in (4, 24, 28)} == {4: 0.5, 24: 0.5,
                                                                              28: 1.0}


def test_a_signal_ends_an_evaluation_and_resume_makes_it_up(digits: Path, tmp_path: Path) -> None:
    slow = {"every_steps": 10, "resize": None, "size": 32, "batch_size": 1, "protocol": "10crop"}
    whole = create_run(config_of(digits, tmp_path, "whole", eval=slow, steps=20))
    finish(whole, 2)
    asked = create_run(config_of(digits, tmp_path, "asked", eval=slow, steps=20))
    ranks = start(asked, 2)
    wait_for_step(asked, 10)  # the evaluation at step 10 takes seconds
    for rank in ranks:
        rank.send_signal(signal.SIGUSR2)
    assert [rank.wait(timeout=60) for rank in ranks] == [75, 75]
    meta = json.loads(asked.checkpoint(10).state.read_text())["meta"]
    assert meta["evaluation_due"], "the signal came within the evaluation"
    assert read_lines(asked.metrics, "val") == []
    finish(asked, 2)
    curves = [[(line["step"], line["loss"], line["top1"]) for line in
               read_lines(run.metrics, "val")] for run in (whole, asked)]
    assert curves[0] == curves[1]
    assert hashes(asked, 20) == hashes(whole, 20)
