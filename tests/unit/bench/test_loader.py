"""The parts of the loader benchmark that need no other process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.bench.loader import LOADERS, PEERS, contact_sheet, one_shard, picture_errors
from resnet_dist.data.shards.reader import DataError
from tests.unit.data.samples import decoded, jpeg_sample, raw_sample, write_dataset


@pytest.fixture
def bench_root(tmp_path: Path) -> Path:
    samples = [jpeg_sample(i, i % 3, 90 + i, 120) for i in range(6)]
    write_dataset(tmp_path / "d", {"train": [samples[:4], samples[4:]]})
    root = tmp_path / "root"
    root.mkdir()
    one_shard(tmp_path / "d", root)
    return root


def test_every_loader_gets_the_same_images(bench_root):
    files = sorted((bench_root / "files").rglob("*.jpg"))
    assert [file.parent.name for file in sorted(files, key=lambda f: f.name)] == [
        "0000", "0001", "0002", "0000"]
    stored = [jpeg_sample(i, 0, 90 + i, 120)[0] for i in range(4)]
    assert sorted(file.read_bytes() for file in files) == sorted(stored)
    assert decoded(stored[0]).shape == (90, 120, 3)
    assert set(PEERS) < set(LOADERS)


def test_our_pictures_are_no_worse_than_ffcvs(bench_root):
    errors = picture_errors(bench_root, 48, crops=40)
    assert 0 < errors["ours"] <= 1.1 * errors["ffcv"] + 0.5


def test_the_contact_sheet_starts_each_row_with_the_centre(bench_root, tmp_path):
    contact_sheet(bench_root, tmp_path / "out" / "sheet.png", 32, rows=3, columns=4)
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (3 * 36, 4 * 36, 3)
    assert (sheet[32:36] == 255).all()
    assert sheet[:32, :32].std() > 5


def test_raw_shards_cannot_be_compared_and_say_so(tmp_path):
    write_dataset(tmp_path / "d", {"train": [[raw_sample(0, 0, 32, 32)]]})
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="raw images"):
        one_shard(tmp_path / "d", tmp_path / "root")
