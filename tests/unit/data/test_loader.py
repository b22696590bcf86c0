"""The loader: the same batch whatever the threads, ranks and restarts, and no silent damage."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.augmentation.normalize import normalization, padding
from resnet_dist.data.decode import decoder
from resnet_dist.data.engine import _Buffers, _Work
from resnet_dist.data.loader import DataError, EvalLoader, TrainLoader
from resnet_dist.data.order import permutation
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.run.paths import DatasetPaths
from tests.unit.data.samples import decoded, jpeg_sample, raw_sample, write_dataset

SIDES = [(60, 80), (75, 50), (64, 64), (48, 97), (101, 66)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 JPEGs of several sizes in 3 shards, 7 for validation."""
    samples = [jpeg_sample(i, i % 10, *SIDES[i % 5]) for i in range(30)]
    return write_dataset(tmp_path_factory.mktemp("photos") / "d",
                         {"train": [samples[:9], samples[9:10], samples[10:23]],
                          "val": [samples[23:]]})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of 32 x 32, half of them raw."""
    samples = [(raw_sample if i % 2 else jpeg_sample)(i, i % 10, 32, 32) for i in range(20)]
    mean = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3)
    return write_dataset(tmp_path_factory.mktemp("tiny") / "d",
                         {"train": [samples[:12], samples[12:]], "val": [samples[:5]]},
                         image_size=(32, 32), pixel_mean=mean)


RRC = AugmentConfig(name="random_resized_crop", size=40, pca=0.1)


def take(dataset: Path, count: int, augment: AugmentConfig = RRC, **options: object) -> list:
    options = {"seed": 5, "batch_size": 8, "threads": 2, "prefetch": 2} | options
    with TrainLoader(dataset, "train", augment, **options) as loader:  # type: ignore[arg-type]
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def same(a, b) -> bool:
    return (torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            and np.array_equal(a.sample_ids, b.sample_ids) and np.array_equal(a.epochs, b.epochs)
            and a.step == b.step)


@given(threads=st.integers(1, 4), prefetch=st.integers(1, 5), first=st.integers(0, 9))
@settings(max_examples=12, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_threads_prefetch_and_restarts_change_no_pixel(photos, threads, prefetch, first):
    whole = take(photos, 12)
    part = take(photos, 12 - first, threads=threads, prefetch=prefetch, first_step=first)
    assert all(same(a, b) for a, b in zip(whole[first:], part, strict=True))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_read_the_global_batch(photos, world):
    whole = take(photos, 4, first_step=2)
    ranks = [take(photos, 4, first_step=2, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert np.array_equal(np.concatenate([part.sample_ids for part in parts]), batch.sample_ids)


def test_every_epoch_has_every_sample_once(photos):
    batches = take(photos, 12)  # 96 positions: four epochs of 23 and a part
    ids = np.concatenate([b.sample_ids for b in batches])
    epochs = np.concatenate([b.epochs for b in batches])
    assert {len(b.labels) for b in batches} == {8}
    for epoch in range(4):
        assert np.array_equal(ids[epochs == epoch], permutation(5, epoch, 23))
    assert all(np.array_equal(b.labels.numpy(), b.sample_ids % 10) for b in batches)


def test_the_same_sample_looks_different_in_each_epoch(photos):
    batches = take(photos, 12)
    ids = np.concatenate([b.sample_ids for b in batches])
    images = torch.cat([b.images for b in batches])
    views = images[torch.from_numpy(ids == ids[0])]
    assert len(views) >= 4
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_pad_crop_copies_pixels_exactly(tiny):
    augment = AugmentConfig(name="pad_crop", size=32, pad=4, normalize="mean")
    fill = np.rint(np.array([0.49, 0.45, 0.41]) * 255).astype(np.uint8)
    samples = [(raw_sample if i % 2 else jpeg_sample)(i, 0, 32, 32) for i in range(20)]
    seen = set()
    for batch in take(tiny, 10, augment):
        for image, sample in zip(batch.images.numpy(), batch.sample_ids, strict=True):
            stored, mode, *_ = samples[sample]
            pixels = np.frombuffer(stored, np.uint8).reshape(32, 32, 3) if mode else decoded(stored)
            canvas = np.empty((40, 40, 3), np.uint8)
            canvas[:] = fill
            canvas[4:36, 4:36] = pixels
            places = [(y, x, flip) for y in range(9) for x in range(9) for flip in (0, 1)
                      if np.array_equal(canvas[y:y + 32, x:x + 32][:, ::-1 if flip else 1], image)]
            assert len(places) == 1
            seen.add(places[0])
    assert len(seen) > 40


@pytest.mark.parametrize("normalize", ["mean", "channel", "pixel"])
def test_padding_is_zero_after_normalization(tiny, normalize):
    manifest, paths = load_manifest(tiny), DatasetPaths(tiny)
    mean, inverse = normalization(manifest, paths, normalize, 32)
    fill = padding(manifest, paths, normalize, 32).astype(np.float32).transpose(2, 0, 1)[None]
    assert np.abs(fill / 255 - mean).max() <= 0.5 / 255 + 1e-6
    assert inverse.dtype == mean.dtype == np.float32
    if normalize == "channel":
        assert np.allclose(inverse.ravel(), 1 / np.array(manifest.std))
    else:
        assert (inverse == 1).all()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_evaluation_sees_every_sample_once_in_order(photos, world, batch_size):
    ids, images = [], []
    for rank in range(world):
        with EvalLoader(photos, "val", resize=48, size=40, batch_size=batch_size, rank=rank,
                        world=world, threads=2) as loader:
            for batch in loader:
                ids += batch.sample_ids.tolist()
                images.append(batch.images)
                assert batch.labels.tolist() == [(23 + i) % 10 for i in batch.sample_ids]
    assert ids == list(range(7))
    assert torch.cat(images).shape == (7, 40, 40, 3)


def test_evaluation_of_small_images_copies_them(tiny):
    with EvalLoader(tiny, "val", resize=None, size=32, batch_size=5, threads=1) as loader:
        (batch,) = loader
    for i, image in enumerate(batch.images.numpy()):
        stored, mode, *_ = (raw_sample if i % 2 else jpeg_sample)(i, 0, 32, 32)
        pixels = np.frombuffer(stored, np.uint8).reshape(32, 32, 3) if mode else decoded(stored)
        assert np.array_equal(image, pixels)


def flip_byte(file: Path, offset: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def test_a_flipped_bit_stops_the_run_within_a_second_and_names_the_sample(tmp_path, monkeypatch):
    samples = [jpeg_sample(i, 0, 60, 60) for i in range(12)]
    root = write_dataset(tmp_path / "d", {"train": [samples[:6], samples[6:]]})
    file = root / "train" / "shard-00001.beton"
    position = file.read_bytes().index(samples[9][0]) + 700
    flip_byte(file, position)
    failed = []
    reason = decoder.last_error

    def noted() -> str:
        failed.append(time.monotonic())
        return reason()

    monkeypatch.setattr(decoder, "last_error", noted)
    with TrainLoader(root, "train", RRC, seed=0, batch_size=4, threads=2) as loader:
        with pytest.raises(DataError, match=r"shard-00001\.beton, sample 3 \(sample 9 of"):
            for _ in zip(loader, range(4), strict=False):
                pass
        assert time.monotonic() - failed[0] < 1


@pytest.mark.parametrize("verify", ["page", "open"])
def test_a_shard_cut_off_while_it_is_trained_on_stops_the_run_naming_the_sample(tmp_path, verify):
    samples = [jpeg_sample(i, 0, 60, 60) for i in range(12)]
    root = write_dataset(tmp_path / "d", {"train": [samples[:6], samples[6:]]})
    file = root / "train" / "shard-00001.beton"
    place = file.read_bytes().index(samples[6][0])
    with TrainLoader(root, "train", RRC, seed=0, batch_size=6, threads=2, prefetch=1,
                     read_ahead=2, verify=verify) as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(file, place)
        with pytest.raises(DataError, match=r"shard-00001\.beton, sample \d \(sample .*cut off"):
            for _ in zip(batches, range(8), strict=False):
                pass
    with pytest.raises(DataError, match=r"shard-00001\.beton: is"):
        TrainLoader(root, "train", RRC, seed=0, batch_size=6)


def test_a_shard_cut_off_while_it_is_evaluated_is_named_too(tmp_path):
    samples = [jpeg_sample(i, 0, 60, 60) for i in range(4)]
    root = write_dataset(tmp_path / "d", {"train": [samples]})
    with ShardReader(root, "train") as reader:
        os.truncate(root / "train" / "shard-00000.beton", 5000)
        with pytest.raises(DataError, match=r"shard-00000\.beton, sample 3 .*cut off"):
            reader.read(3)


def test_closing_leaves_no_thread_and_no_iteration(photos):
    before = set(threading.enumerate())
    loader = TrainLoader(photos, "train", RRC, seed=0, batch_size=8, threads=3)
    next(iter(loader))
    assert len(set(threading.enumerate()) - before) == 5  # 3, planner, read-ahead
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(DataError, match="closed"):
        next(iter(loader))


def test_memory_of_a_batch_is_not_reused_while_any_view_of_it_lives(photos):
    with TrainLoader(photos, "train", RRC, seed=0, batch_size=8, threads=2) as loader:
        batches = iter(loader)
        view = next(batches).images[3:5]
        before = view.clone()
        for _ in range(8):
            next(batches)
        assert torch.equal(view, before)


def test_memory_of_the_size_taken_last_is_kept_and_no_other():
    buffers = _Buffers()
    old, new, again = (buffers.take(2, size)[1] for size in (32, 40, 40))
    first = new.data_ptr()
    del new
    del old, again  # a batch of the old size comes back after one of the new
    assert [base.size for base in buffers._free] == [2 * 40 * 40 * 3] * 2
    late = [buffers.take(2, 40)[1] for _ in range(2)]
    assert first in {tensor.data_ptr() for tensor in late}
    buffers.clear()
    del late
    assert buffers._free == []


def test_threads_that_wait_keep_no_batch(tiny):
    gc.collect()  # batches of loaders that failed, in the tracebacks of their errors
    with EvalLoader(tiny, "train", resize=None, size=32, batch_size=5, threads=3) as loader:
        assert sum(len(batch.sample_ids) for batch in loader) == 20
        deadline = time.monotonic() + 10
        while left := [thing for thing in gc.get_objects() if type(thing) is _Work]:
            assert time.monotonic() < deadline, f"{len(left)} batches are still held"
            del left
            time.sleep(0.05)


def test_importing_ffcv_leaves_the_models_threads_alone():
    import subprocess
    import sys
    code = ("import torch; torch.set_num_threads(2)\n"
            "import resnet_dist.data.loader\nprint(torch.get_num_threads())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
