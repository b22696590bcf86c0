"""Conversion of small real sources, against Pillow, FFCV's own loader, and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.convert import ConvertError, convert
from data_prep.verify import verify
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards import beton
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import (
    file_bytes,
    hashes,
    make_tar,
    make_tree,
    options,
    picture,
    read_back,
)

FFCV_TYPES = """
from ffcv import types
from ffcv.fields import IntField, RGBImageField
from resnet_dist.data.shards import beton
assert types.HeaderType == beton.HEADER
assert types.FieldDescType == beton.FIELD
assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
assert types.get_metadata_type([RGBImageField(), IntField(), IntField()]) == beton.SAMPLE
assert types.CURRENT_VERSION == beton.VERSION
assert [types.TYPE_ID_HANDLER[kind] for _, kind in beton.FIELDS] == [
    RGBImageField, IntField, IntField]
"""


def test_shard_types_equal_those_of_ffcv():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FFCV_TYPES], check=True, timeout=240,
                   cwd=Path(__file__).parents[3])


def test_stored_images_equal_what_pillow_decodes_from_the_source(tmp_path):
    source = make_tree(tmp_path / "source")
    manifest = convert(str(source), tmp_path / "dst", options("workers=1"))
    assert manifest.classes == ("ant", "bee", "cat")
    for split in ("train", "val"):
        stored = read_back(tmp_path / "dst", split)
        files = sorted((source / split).rglob("*.jpg"))
        assert len(stored) == len(files) == 12
        for (label, pixels), file in zip(stored, files, strict=True):
            assert manifest.classes[label] == file.parent.name
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(file)))


STOCK_LOADER = """
import sys
import numpy as np
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
out, *shards = sys.argv[1:]
images, labels = [], []
for number, shard in enumerate(shards):
    loader = Loader(shard, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False, os_cache=number % 2 == 0,
                    pipelines={"image": [CenterCropRGBImageDecoder((64, 64), 1.0)],
                               "label": [IntDecoder()], "digest": None})
    for batch in loader:
        images.append(np.asarray(batch[0]).copy())
        labels.append(np.asarray(batch[1])[:, 0].copy())
np.savez(out, images=np.concatenate(images), labels=np.concatenate(labels))
"""


def test_stock_ffcv_loader_reads_every_shard(tmp_path):
    source, shards, expected = tmp_path / "source", [], []
    for index in range(8):
        (source / "train" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        (source / "train" / str(index % 2) / f"{index}.jpg").write_bytes(
            file_bytes(picture(index, 64, 64), quality=95))
    for encoding in ("jpeg", "raw", "mixed"):
        dst = tmp_path / encoding
        convert(str(source), dst, options(f"encoding={encoding}", "shard_samples=4"))
        shards += [str(dst / shard.file) for shard in load_manifest(dst).splits["train"].shards]
        expected += read_back(dst, "train")
    subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK_LOADER, str(tmp_path / "out.npz"),
                    *shards], check=True, timeout=280)
    found = np.load(tmp_path / "out.npz")
    assert found["labels"].tolist() == [label for label, _ in expected]
    # FFCV decodes with libjpeg's fast DCT, Pillow with the accurate one.
    difference = np.abs(found["images"].astype(int) - np.stack([image for _, image in expected]))
    assert len(difference) == 24
    assert difference.max() <= 16
    assert difference.mean() < 2


def test_mean_and_std_equal_those_of_all_stored_pixels(tmp_path):
    convert(str(make_tree(tmp_path / "source")), tmp_path / "dst", options())
    manifest = load_manifest(tmp_path / "dst")
    pixels = np.concatenate([image.reshape(-1, 3) for _, image
                             in read_back(tmp_path / "dst", "train")]) / 255.0
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), rtol=1e-9)


def test_mean_and_std_of_many_large_images_are_estimated_from_a_few_rows(tmp_path):
    folder = tmp_path / "source" / "train" / "class"
    folder.mkdir(parents=True)
    images = [picture(number, 160, 160) for number in range(400)]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.jpg", quality=95)
    manifest = convert(str(tmp_path / "source"), tmp_path / "dst", options("accept=[one_class]"))
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]) / 255.0
    assert 0 < manifest.source["measured_images"] < 400
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=0.02)


def test_digits_are_the_digits_and_split_without_overlap(tmp_path):
    from sklearn.datasets import load_digits

    manifest = convert("digits", tmp_path / "dst", options())
    assert manifest.image_size == (32, 32)
    assert (manifest.splits["train"].samples, manifest.splits["val"].samples) == (1438, 359)
    stored = [(label, (image[::4, ::4, 0] / (255 / 16)).round().astype(int).tobytes())
              for split in ("train", "val") for label, image in read_back(tmp_path / "dst", split)]
    digits = load_digits()
    original = [(int(label), image.astype(int).tobytes())
                for label, image in zip(digits.target, digits.images, strict=True)]
    assert sorted(stored) == sorted(original)
    train = [image for _, image in read_back(tmp_path / "dst", "train")]
    mean = np.load(tmp_path / "dst" / "pixel_mean.npy")
    np.testing.assert_allclose(mean, np.mean(train, axis=0), atol=1e-4)


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w:"), ("s.tar.gz", "w:gz"),
                                            ("s.tar.xz", "w:xz"), ("s.tar.bz2", "w:bz2")])
def test_a_tar_gives_the_same_shards_as_its_folders(tmp_path, name, mode):
    tree = make_tree(tmp_path / "tree")
    tar = make_tar(tmp_path / name, tree, mode, prefix="wrapped/deep/")
    convert(str(tree), tmp_path / "a", options("workers=1"))
    convert(str(tar), tmp_path / "b", options("workers=1"))
    shards = {name: sha for name, sha in hashes(tmp_path / "a").items() if "shard" in name}
    assert shards
    assert shards.items() <= hashes(tmp_path / "b").items()


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    source = str(make_tree(tmp_path / "source"))
    for workers in (1, 2, 3):
        convert(source, tmp_path / str(workers) / "dst",
                options(f"workers={workers}", "shard_samples=3"))
    one = hashes(tmp_path / "1")
    assert len([name for name in one if name.endswith(".beton")]) == 8
    assert one == hashes(tmp_path / "2") == hashes(tmp_path / "3")


def test_val_fraction_holds_out_a_part_of_every_class(tmp_path):
    source = make_tree(tmp_path / "source", per_class=10, splits=("train",))
    convert(str(source), tmp_path / "dst", options("val_fraction=0.3"))
    labels = [label for label, _ in read_back(tmp_path / "dst", "val")]
    assert sorted(labels) == [0] * 3 + [1] * 3 + [2] * 3
    assert len(read_back(tmp_path / "dst", "train")) == 21


def test_a_source_without_val_gives_no_val(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train",))
    assert set(convert(str(source), tmp_path / "dst", options()).splits) == {"train"}


def test_the_same_command_again_touches_nothing(tmp_path):
    source = str(make_tree(tmp_path / "source"))
    convert(source, tmp_path / "dst", options())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*")}
    convert(source, tmp_path / "dst", options())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*")}


def test_another_conversion_into_a_finished_directory_is_refused(tmp_path):
    source = str(make_tree(tmp_path / "source"))
    convert(source, tmp_path / "dst", options())
    with pytest.raises(ConfigError, match="holds another data set"):
        convert(source, tmp_path / "dst", options("quality=50"))
    with pytest.raises(ConfigError, match="is not empty"):
        convert(source, tmp_path, options())


def test_bad_images_are_listed_with_reasons_and_fail_the_command(tmp_path):
    source = make_tree(tmp_path / "source")
    good = (source / "train" / "ant" / "0.jpg").read_bytes()
    (source / "train" / "ant" / "1.jpg").write_bytes(good[:len(good) // 2])
    (source / "train" / "bee" / "2.jpg").write_bytes(b"")
    (source / "val" / "cat" / "3.jpg").write_bytes(b"no image at all")
    with pytest.raises(ConvertError, match=r"3 of 24 images.*max_rejected=3"):
        convert(str(source), tmp_path / "dst", options())
    assert not (tmp_path / "dst" / "dataset.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*.beton")}
    manifest = convert(str(source), tmp_path / "dst", options("max_rejected=3"))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*.beton")}
    assert before == after
    rejected = [json.loads(line) for line in
                (tmp_path / "dst" / "rejected.jsonl").read_text().splitlines()]
    assert {entry["image"]: entry["split"] for entry in rejected} == {
        "train/ant/1.jpg": "train", "train/bee/2.jpg": "train", "val/cat/3.jpg": "val"}
    assert (manifest.splits["train"].samples, manifest.splits["val"].samples) == (10, 11)
    assert verify(tmp_path / "dst", deep=True).ok


def test_a_killed_conversion_goes_on_and_ends_in_the_same_bytes(tmp_path):
    source = str(make_tree(tmp_path / "source", per_class=100))
    convert(source, tmp_path / "whole" / "dst", options("workers=1", "shard_samples=5"))
    command = [sys.executable, "-c", "import sys; from pathlib import Path; "
               "from data_prep.convert import convert, parse_convert_overrides as o; "
               "convert(sys.argv[1], Path(sys.argv[2]), o(['workers=2', 'shard_samples=5']))",
               source, str(tmp_path / "cut" / "dst")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    (tmp_path / "cut").mkdir()
    for kill in range(3):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        deadline = time.monotonic() + 60
        while (process.poll() is None and time.monotonic() < deadline
               and len(list((tmp_path / "cut").rglob("records/*.json"))) < 3 * kill + 1):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut" / "dst" / "dataset.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.beton")}
    assert len(done) >= 3
    convert(source, tmp_path / "cut" / "dst", options("workers=2", "shard_samples=5"))
    touched = [path for path, time_ns in done.items() if path.stat().st_mtime_ns != time_ns]
    assert len(touched) <= 2  # shards whose record the last kill prevented, one a worker
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "cut")


def test_a_worker_that_dies_is_an_error_naming_its_shard(tmp_path, monkeypatch):
    source = str(make_tree(tmp_path / "source"))
    from data_prep.conversion import pool

    original = pool.Worker.give

    def give_and_kill(self, shard):
        original(self, shard)
        self.process.kill()

    monkeypatch.setattr(pool.Worker, "give", give_and_kill)
    start = time.monotonic()
    with pytest.raises(ConvertError, match=r"shard-0000\d.beton: its worker was killed by sig"):
        convert(source, tmp_path / "dst", options("workers=2"))
    assert time.monotonic() - start < 20


def test_a_worker_that_hangs_is_an_error_naming_its_shard(tmp_path, monkeypatch):
    source = str(make_tree(tmp_path / "source"))
    from data_prep.conversion import pool

    original = pool.Worker.give

    def give_and_stop(self, shard):
        self.process.send_signal(signal.SIGSTOP)
        original(self, shard)

    monkeypatch.setattr(pool.Worker, "give", give_and_stop)
    monkeypatch.setattr(pool, "HANG_S", 1.0)
    with pytest.raises(ConvertError, match=r"shard-0000\d.beton: no progress for 1 s"):
        convert(source, tmp_path / "dst", options("workers=2", "shard_samples=3"))


@pytest.mark.parametrize(("item", "message"), [
    ("qualty=3", "qualty = 3: unknown key; did you mean 'quality'"),
    ("quality=101", "quality = 101: .*less than or equal to 100"),
    ("encoding=png", "encoding = png: .*'auto', 'jpeg', 'raw' or 'mixed'"),
    ("longer_side=5 shorter_side=5", "not both"),
    ("name=../x", "name = ../x: use letters"),
])
def test_wrong_options_are_named_with_a_remedy(item, message):
    with pytest.raises(ConfigError, match=message):
        options(*item.split())


def test_sources_that_are_none_are_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match="no such file or directory, and not 'digits'"):
        convert(str(tmp_path / "absent"), tmp_path / "dst", options())
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(file_bytes(picture(1)))
    with pytest.raises(ConfigError, match="lie in no class folders"):
        convert(str(tmp_path / "flat"), tmp_path / "dst", options())
    (tmp_path / "flat" / "a.jpg").unlink()
    with pytest.raises(ConfigError, match="no images found"):
        convert(str(tmp_path / "flat"), tmp_path / "dst", options())


def test_a_flipped_label_is_noticed_when_the_data_set_is_opened(
        digits: Path, tmp_path: Path) -> None:
    from resnet_dist.data.shards.reader import DataError, ShardReader

    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    shard = copy / "train" / "shard-00000.beton"
    content = bytearray(shard.read_bytes())
    with open(shard, "rb") as file:
        first = beton.read_index(file.fileno()).samples[:1]
    label_at = content.find(first.tobytes()) + first.dtype.fields["f1"][1]
    content[label_at] ^= 1
    shard.write_bytes(content)
    with ShardReader(digits, "train"):
        pass
    with pytest.raises(DataError, match="labels or metadata"):
        ShardReader(copy, "train")
