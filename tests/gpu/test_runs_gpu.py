"""Whole short runs on a GPU: its pictures are drawn, `eval` has training's figures to the bit, and
a rank sits near its GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from launcher.frozen.freeze import create_run
from resnet_dist.evaluate.report import Request
from resnet_dist.ranks import devices
from resnet_dist.run.curves import read_lines
from tests.dist.harness import run_ranks
from tests.dist.runs import join, make_config
from tests.dist.test_evaluate import config_of, evaluated, images_on_board, train_rank


@pytest.mark.parametrize("values", [
    {"precision": "bf16"}, {"precision": "bf16", "cuda_graphs": True},
    {"precision": "fp32", "mode": "exact", "optimizer": {"name": "adamw", "lr": 0.001}}], ids=str)
def test_a_run_draws_its_pictures_and_eval_has_its_figures_to_the_bit(
        digits: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    run = create_run(config_of(digits, tmp_path, "gpu", device="cuda",
                               launch={"ranks_per_node": 1},
                               log={"every_steps": 4, "panels_every_steps": 6}, **values))
    assert run_ranks(train_rank, 1, run.root, fresh=True) == [0]
    assert {"train/images", "val/mistakes", "layers/responses"} <= set(images_on_board(run))
    assert not [line for line in read_lines(run.metrics, "event") if line["what"] == "alarm"]
    seen = read_lines(run.metrics, "val")[-1]
    for weights, prefix in (("raw", ""), ("ema", "ema_")):
        found = run_ranks(evaluated, 1, Request(run.root, weights=weights), fresh=True)[0]
        assert [found[key] for key in ("loss", "top1")] == [
            seen[prefix + key] for key in ("loss", "top1")]


def cores_taken() -> tuple[int, set[int], set[int]]:
    world = join(make_config(1, device="cuda"))
    uuid = str(torch.cuda.get_device_properties(world.device).uuid)
    return world.cores, os.sched_getaffinity(0), devices.cores_near(uuid)


def test_a_rank_sits_near_its_gpu() -> None:
    before = os.sched_getaffinity(0)
    cores, bound, near = run_ranks(cores_taken, 1, fresh=True)[0]
    if not near:
        pytest.skip("the system does not say which cores are near the GPU")
    assert bound in (before, near & before)
    assert 1 <= cores <= len(bound)
