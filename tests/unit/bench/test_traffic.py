"""Bytes and FLOPs of a step against an independent count of ResNet-50's kernels."""

from __future__ import annotations

import pytest

from resnet_dist.bench.traffic import floor_s, step_kernels, totals

H200 = (4.3e12, 790e12)  # bytes/s and FLOP/s that the independent count assumed


def test_resnet50_moves_what_was_counted_by_hand() -> None:
    kernels = step_kernels("resnet50", batch=256, size=224, num_classes=1000, level="eager")
    size, flops = totals(kernels)
    assert flops == pytest.approx(6.22e12, rel=0.002)
    assert size == pytest.approx(122.1e9, rel=0.001)
    assert 256 / floor_s(kernels, *H200) == pytest.approx(8136, rel=0.002)


def test_fusing_moves_less_but_not_as_little_as_is_possible() -> None:
    """By hand 83.1 GB, where shortcut gradients are added inside convolutions, the projections'
    BatchNorm inside the block's last one, and the stem's inside its pooling; ours are not."""
    size, _ = totals(step_kernels("resnet50", batch=256, size=224, num_classes=1000,
                                  level="fused"))
    assert 83.1e9 < size < 95e9


def test_bytes_grow_with_the_batch_and_flops_with_the_depth() -> None:
    def of(name: str, batch: int) -> tuple[float, float]:
        return totals(step_kernels(name, batch=batch, size=32, num_classes=10, level="fused"))

    assert of("resnet20", 64)[1] == pytest.approx(2 * of("resnet20", 32)[1])
    assert 1.9 < of("resnet20", 64)[0] / of("resnet20", 32)[0] <= 2
    assert 2.5 < of("resnet56", 32)[1] / of("resnet20", 32)[1] < 3.5
