"""What a step runs, kernel by kernel, as the dispatcher sees it: nothing changes a layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.runs import build, global_batch, join, make_config


class Conversions(TorchDispatchMode):
    """Shapes of 4-D tensors that were copied from one order of their memory into another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (),
                           keywords: Any = None) -> Any:
        self.calls += 1
        result = function(*arguments, **(keywords or {}))
        if any(name in str(function) for name in ("clone", "_to_copy", "copy_")):
            source = arguments[1] if "copy_." in str(function) else arguments[0]
            for t in (source, result):
                if not isinstance(t, Tensor) or t.dim() != 4 or min(t.shape[1:]) < 2:
                    return result
            if source.stride() != result.stride() and source.is_floating_point():
                self.found.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["resnet20", "resnet18", "resnet50"])
def test_no_kernel_of_a_step_changes_a_layout(model: str, precision: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    config = make_config(1, precision=precision, model={"name": model})
    engine = build(config, join(config))
    images, labels, keys = global_batch(config, 0)
    larger = images.repeat(1, 4, 4, 1)[:8]  # 64 pixels: the last activations still have 2 x 2
    engine.train_step(larger, labels[:8], keys[:8], 0.1)
    with Conversions() as seen:
        engine.train_step(larger, labels[:8], keys[:8], 0.1)
    assert seen.calls > 500
    # The average over pixels hands back one gradient for all pixels, which must be written out.
    last = {"resnet20": (8, 64, 16, 16), "resnet18": (8, 512, 2, 2), "resnet50": (8, 2048, 2, 2)}
    assert seen.found == [last[model]]


def test_the_detector_detects() -> None:
    with Conversions() as seen:
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert seen.found == [(2, 3, 4, 5)]
