"""Batches of the loader against those made from scratch: the slow order, the slow draws, Pillow's
pixels and a resize in float64. Resumed anywhere, at any size.
"""

from __future__ import annotations

import gc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data import order
from resnet_dist.data.loader import TrainLoader
from tests.unit.data.samples import Sample, decoded, jpeg_sample, write_dataset
from tests.unit.data.test_augment import slow_plan
from tests.unit.data.test_native import slow_resize, unclamped
from tests.unit.data.test_order import slow_permutation

SEED, N, BATCH = 11, 13, 6
SAMPLES: list[Sample] = [jpeg_sample(i, i % 10, *[(60, 80), (75, 50), (48, 97)][i % 3])
                         for i in range(N)]
AUGMENTS = {
    "scale_crop": AugmentConfig(name="scale_crop", size=40, min_side=45, max_side=90),
    "random_resized_crop": AugmentConfig(name="random_resized_crop", size=40, scale=(0.1, 1.0)),
    "pad_crop": AugmentConfig(name="pad_crop", size=40, pad=4),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("oracle") / "d",
                         {"train": [SAMPLES[:5], SAMPLES[5:6], SAMPLES[6:]]})


def load(dataset: Path, augment: AugmentConfig, first: int, count: int, **options: object) -> list:
    with TrainLoader(dataset, "train", augment, seed=SEED, batch_size=BATCH, first_step=first,
                     threads=2, **options) as loader:  # type: ignore[arg-type]
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def slow_image(augment: AugmentConfig, epoch: int, sample: int) -> np.ndarray:
    """float64 [S, S, 3], as the papers have it."""
    stored, _, height, width, _ = SAMPLES[sample]
    top, left, tall, wide, flip = slow_plan(augment, SEED, epoch, sample, height, width,
                                            augment.size)
    if augment.name == "pad_crop":
        canvas = np.empty((height + 8, width + 8, 3))
        canvas[:] = np.rint(np.array([0.49, 0.45, 0.41]) * 255)
        canvas[4:-4, 4:-4] = decoded(stored)
        image = canvas[int(top) + 4:, int(left) + 4:][:augment.size, :augment.size]
        return image[:, ::-1] if flip else image
    return np.clip(slow_resize(unclamped(stored), (top, left, tall, wide), augment.size, flip),
                   0, 255)


@pytest.mark.parametrize("name", AUGMENTS)
def test_batches_are_those_made_from_scratch(photos, name):
    augment = AUGMENTS[name]
    for batch in load(photos, augment, 3, 5):
        for i, position in enumerate(range(batch.step * BATCH, (batch.step + 1) * BATCH)):
            epoch = position // N
            sample = slow_permutation(SEED, epoch, N)[position % N]
            assert (batch.epochs[i], batch.sample_ids[i]) == (epoch, sample)
            assert batch.labels[i] == SAMPLES[sample][4]
            difference = np.abs(batch.images[i].numpy() - slow_image(augment, epoch, sample))
            assert difference.max() < (1e-9 if name == "pad_crop" else 4)
            assert difference.mean() < 0.6


def test_every_step_can_be_the_first(photos):
    augment = AUGMENTS["random_resized_crop"]
    whole = load(photos, augment, 0, 9)  # four epochs, each but one ending inside of a batch
    for first in range(9):
        for rank in range(2):
            (batch,) = load(photos, augment, first, 1, rank=rank, world=2)
            here = slice(rank * 3, rank * 3 + 3)
            assert torch.equal(batch.images, whole[first].images[here])
            assert np.array_equal(batch.sample_ids, whole[first].sample_ids[here])


def test_a_late_step_opens_with_the_work_of_the_first(photos, monkeypatch):
    made: list[int] = []
    make = order.permutation.__wrapped__

    def counted(seed: int, epoch: int, n: int) -> np.ndarray:
        made.append(epoch)
        return make(seed, epoch, n)

    monkeypatch.setattr(order, "permutation", lru_cache(3)(counted))
    for first in (0, 600_000):
        made.clear()
        load(photos, AUGMENTS["scale_crop"], first, 1, read_ahead=0, prefetch=1)
        assert len(made) <= 3  # those of this batch, of the one ahead, and the next epoch's
        assert min(made) == first * BATCH // N


def numba_compilations() -> int:
    """Signatures of all functions that FFCV's compiler has compiled in this process."""
    # type(), as isinstance asks what a weak proxy stands for, which may be gone.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Dispatcher)]
    return sum(len(thing.signatures) for thing in found
               if thing.py_func.__module__.startswith(("ffcv", "resnet_dist")))


def test_sizes_change_without_compiling_or_keeping_the_old(photos):
    augment = AugmentConfig(name="random_resized_crop", size=48, sizes=((1, 32), (2, 40)))
    load(photos, augment, 0, 1)
    compiled = numba_compilations()
    with TrainLoader(photos, "train", augment, seed=SEED, batch_size=BATCH, threads=2) as loader:
        sides = []
        for batch, _ in zip(loader, range(9), strict=False):
            sides.append(batch.images.shape[1])
            del batch
        kept = loader._engine._buffers._free  # type: ignore[union-attr]
        assert {base.size for base in kept} <= {BATCH * 40 * 40 * 3}
    assert sides == [{0: 48, 1: 32}.get(step * BATCH // N, 40) for step in range(9)]
    assert numba_compilations() == compiled > 0
