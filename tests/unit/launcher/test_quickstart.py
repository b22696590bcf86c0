"""On what the quickstart's ranks compute, by the number of GPUs."""

from __future__ import annotations

import pytest

from launcher import quickstart
from resnet_dist.config.load import load_config


@pytest.mark.parametrize(("gpus", "device", "ranks", "said"), [
    (0, "cpu", 2, "no GPU"), (1, "cuda", 1, "one rank instead of two"),
    (2, "cuda", 2, "two ranks on two"), (8, "cuda", 2, "two ranks on two")])
def test_no_two_ranks_share_a_gpu_and_what_is_used_is_said(gpus: int, device: str, ranks: int,
                                                          said: str) -> None:
    words, settings = quickstart.on_this_machine(gpus)
    config = load_config(quickstart.RECIPE, settings)
    assert (config.device, config.world) == (device, ranks)
    assert said in words


def test_gpus_are_counted_as_torch_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert quickstart.usable_gpus() == 0
