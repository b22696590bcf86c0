"""Damage of every kind is found and named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from data_prep.convert import convert, parse_convert_overrides
from data_prep.verify import verify
from resnet_dist.data.shards.beton import read_index
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import file_bytes, make_tree, picture


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    convert(str(make_tree(root / "source")), root / "dst",
            parse_convert_overrides(["shard_samples=6", "encoding=mixed"]))
    return root / "dst"


def test_a_whole_data_set_has_no_problems_and_is_described(whole):
    for deep in (False, True):
        report = verify(whole, deep=deep)
        assert report.ok, report.problems
    rows = dict(report.summary_rows())
    assert rows["split train"].startswith("12 images, 4 to 4 a class, 2 shards")
    assert json.loads(json.dumps(report.as_json()))["ok"]
    assert report.class_counts == {"train": [4, 4, 4], "val": [4, 4, 4]}


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_any_flipped_bit_of_a_shard_is_found_and_its_shard_named(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    draw = random.Random(0)
    files = sorted(copy.rglob("*.beton"))
    # Flips all over a shard are mostly in padding: half of them go where the content is.
    for trial in range(60):
        path = draw.choice(files)
        end = path.stat().st_size if trial % 2 else 3147 + 6 * 32
        bit = draw.randrange(8 * end)
        flip(path, bit)
        problems = verify(copy).problems
        assert len(problems) >= 1, f"bit {bit} of {path.name}"
        assert all(str(path.relative_to(copy)) in problem for problem in problems)
        flip(path, bit)
    assert verify(copy).ok


def test_a_flip_inside_a_sample_names_the_sample(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    path = copy / load_manifest(copy).splits["train"].shards[1].file
    with open(path, "rb") as file:
        index = read_index(file.fileno())
    for sample in (0, 3, 5):
        bit = 8 * (int(index.pointers[sample]) + int(index.sizes[sample]) // 2) + 3
        flip(path, bit)
        (problem,) = verify(copy).problems
        assert f"{path.name}: sample {sample}: its bytes do not match its hash" in problem
        flip(path, bit)


@pytest.mark.parametrize("keep", [0, 100, 4000, -24, -1])
def test_a_truncated_shard_is_found(whole, tmp_path, keep):
    copy = shutil.copytree(whole, tmp_path / "copy")
    path = next(copy.rglob("*.beton"))
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    (problem,) = verify(copy).problems
    assert path.name in problem
    assert "the manifest says" in problem


def test_a_missing_and_a_foreign_shard_are_found(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "train" / "shard-00000.beton").rename(copy / "train" / "shard-00007.beton")
    assert sorted(problem for problem in verify(copy).problems) == [
        "train/shard-00000.beton: is missing",
        "train/shard-00007.beton: is not in the manifest"]


def test_a_flipped_bit_in_the_manifest_or_the_mean_image_is_found(tmp_path):
    dst = tmp_path / "dst"
    convert("digits", dst, parse_convert_overrides([]))
    draw = random.Random(1)
    for name in ("dataset.json", "pixel_mean.npy"):
        path = dst / name
        for _ in range(20):
            bit = draw.randrange(8 * path.stat().st_size)
            flip(path, bit)
            assert verify(dst).problems, f"bit {bit} of {name}"
            flip(path, bit)


def test_an_unfinished_conversion_is_no_data_set(tmp_path):
    (tmp_path / "train").mkdir()
    (problem,) = verify(tmp_path).problems
    assert "did not finish" in problem


# -- Warnings: whole, and yet not fit to learn from ------------------------------------------------

def converted(root: Path, counts: dict[str, dict[str, list[int]]], *items: str) -> Path:
    """A data set of 16 x 16 pictures; `counts`: by split and class, which pictures by number."""
    for split, classes in counts.items():
        for name, pictures in classes.items():
            (root / "source" / split / name).mkdir(parents=True)
            for number, seed in enumerate(pictures):
                (root / "source" / split / name / f"{number:04d}.jpg").write_bytes(
                    file_bytes(picture(seed, 16, 16)))
    convert(str(root / "source"), root / "dst", parse_convert_overrides(list(items)))
    return root / "dst"


def test_a_balanced_data_set_without_duplicates_has_no_warning(whole):
    assert verify(whole).warnings == []


@pytest.mark.parametrize(("most", "warned"), [(199, False), (200, True)])
def test_classes_of_a_hundred_to_one_are_told(tmp_path, most, warned):
    dst = converted(tmp_path, {"train": {"ant": [*range(most)], "bee": [7000, 7001]},
                               "val": {"ant": [8000], "bee": [8001]}})
    report = verify(dst)
    assert report.ok
    assert report.warnings == (["split train: 200 images of 'ant' and 2 of 'bee': more than 100 "
                                "to 1; accuracy by class will tell more than the mean"]
                               if warned else [])


def test_classes_that_a_split_lacks_are_named(tmp_path):
    dst = converted(tmp_path, {"train": {"ant": [1, 2], "bee": [3, 4]},
                               "val": {"bee": [5], "cat": [6]}}, "accept=[unequal_classes]")
    lacks, other = verify(dst).warnings
    assert lacks == ("split train: has no image of 1 of 3 classes (cat); they cannot be learnt")
    assert "split val: has no image of 1 of 3 classes (ant)" in other


def test_an_image_of_two_splits_is_named_in_both(tmp_path):
    dst = converted(tmp_path, {"train": {"ant": [1, 2, 3], "bee": [4, 5, 6]},
                               "val": {"ant": [7, 2], "bee": [3, 8]}}, "shard_samples=2")
    (warning,) = verify(dst).warnings
    assert warning == (
        "2 images are in train and in val as well, 1 of them with another label "
        "(train/shard-00000.beton sample 1 = val/shard-00000.beton sample 1, "
        "train/shard-00001.beton sample 0 = val/shard-00001.beton sample 0); what was trained on "
        "measures nothing")
    assert json.loads(json.dumps(verify(dst).as_json()))["warnings"] == [warning]


def test_a_damaged_data_set_has_problems_alone(tmp_path):
    dst = converted(tmp_path, {"train": {"ant": [1], "bee": [2]}, "val": {"ant": [1], "bee": [4]}})
    assert len(verify(dst).warnings) == 1
    shard = next((dst / "val").glob("*.beton"))
    shard.write_bytes(shard.read_bytes()[:-1])
    report = verify(dst)
    assert report.problems
    assert report.warnings == []
