"""Kills at random moments, appended splits, class lists, and pictures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion.plan import load_plan
from data_prep.convert import convert
from data_prep.verify import verify
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import file_bytes, hashes, make_tree, options, picture, read_back

ROOT = Path(__file__).parents[3]
COMMAND = ("import sys; from pathlib import Path; "
           "from data_prep.convert import convert, parse_convert_overrides as o; "
           "convert(sys.argv[1], Path(sys.argv[2]), o(sys.argv[3:]))")


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_byte(tmp_path):
    source = str(make_tree(tmp_path / "source", per_class=120))
    wanted = ["workers=2", "shard_samples=4"]
    start = time.monotonic()
    convert(source, tmp_path / "whole" / "dst", options(*wanted))
    whole_s = time.monotonic() - start
    draw = random.Random(11)
    (tmp_path / "cut").mkdir()
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", COMMAND, source,
                                    str(tmp_path / "cut" / "dst"), *wanted],
                                   env=os.environ | {"PYTHONPATH": str(ROOT)},
                                   start_new_session=True)
        time.sleep(draw.uniform(0.3, max(whole_s * 0.6, 0.5)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    convert(source, tmp_path / "cut" / "dst", options(*wanted))
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_workers_end_when_their_parent_is_killed(tmp_path):
    source = str(make_tree(tmp_path / "source", per_class=200))
    process = subprocess.Popen([sys.executable, "-c", COMMAND, source, str(tmp_path / "dst"),
                                "workers=2", "shard_samples=5"],
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # the parent alone, not its group
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _workers_of(tmp_path / "dst"):
        time.sleep(0.05)
    assert not _workers_of(tmp_path / "dst")


def _workers_of(dst: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "data_prep.conversion.worker" in words and str(dst) in words:
            found.append(folder.name)
    return found


def test_an_unfinished_conversion_of_something_else_starts_anew(tmp_path):
    source = make_tree(tmp_path / "source")
    (source / "train" / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(Exception, match="max_rejected"):
        convert(str(source), tmp_path / "dst", options("quality=50"))
    old = load_plan(tmp_path / "dst")
    assert old is not None
    (source / "train" / "ant" / "0.jpg").write_bytes(file_bytes(picture(77)))
    convert(str(source), tmp_path / "dst", options("quality=60", "shard_samples=5"))
    assert verify(tmp_path / "dst", deep=True).ok


def test_a_split_is_appended_without_touching_the_others(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train", "val"))
    whole = convert(str(source), tmp_path / "whole", options())
    convert(str(source / "train"), tmp_path / "dst", options())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst" / "train").iterdir()}
    manifest = convert(str(source / "val"), tmp_path / "dst", options("append=true", "split=val"))
    assert before == {path: path.stat().st_mtime_ns
                      for path in (tmp_path / "dst" / "train").iterdir()}
    assert manifest.splits == whole.splits
    assert (manifest.classes, manifest.mean, manifest.std) == (whole.classes, whole.mean, whole.std)
    assert verify(tmp_path / "dst", deep=True).ok
    again = convert(str(source / "val"), tmp_path / "dst", options("append=true", "split=val"))
    assert again == manifest


def test_what_does_not_fit_is_not_appended(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train", "val"))
    with pytest.raises(ConfigError, match="no finished data set to append to"):
        convert(str(source), tmp_path / "dst", options("append=true"))
    convert(str(source / "train"), tmp_path / "dst", options())
    with pytest.raises(ConfigError, match="split 'train' is in the data set already"):
        convert(str(source / "val"), tmp_path / "dst", options("append=true"))
    with pytest.raises(ConfigError, match="quality = 50: the data set was made with quality=90"):
        convert(str(source / "val"), tmp_path / "dst",
                options("append=true", "split=val", "quality=50"))
    (source / "val" / "ant").rename(source / "val" / "dog")
    with pytest.raises(ConfigError, match="class 'dog' is not among the 3 known"):
        convert(str(source / "val"), tmp_path / "dst", options("append=true", "split=val"))
    assert verify(tmp_path / "dst").ok
    assert set(load_manifest(tmp_path / "dst").splits) == {"train"}


def test_a_list_of_classes_sets_the_order_of_labels(tmp_path):
    source = make_tree(tmp_path / "source", splits=("train",))
    (tmp_path / "classes.txt").write_text("cat\nzebra\nbee\nant\n")
    manifest = convert(str(source), tmp_path / "dst",
                       options(f"classes={tmp_path / 'classes.txt'}"))
    assert manifest.classes == ("cat", "zebra", "bee", "ant")
    labels = [label for label, _ in read_back(tmp_path / "dst", "train")]
    assert labels == [3] * 4 + [2] * 4 + [0] * 4  # folders in order: ant, bee, cat


def test_the_pictures_show_the_images_and_the_counts(tmp_path):
    for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
        folder = tmp_path / "source" / "train" / name
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(
                file_bytes(Image.new("RGB", (40, 40), colour), "PNG"))
    convert(str(tmp_path / "source"), tmp_path / "dst", options())
    sheet = np.asarray(Image.open(tmp_path / "dst" / "contact_sheet.png")).astype(int)
    first, last = sheet[56, 56], sheet[56, 5 * 112 + 56]
    assert np.abs(first - (0, 0, 250)).max() < 12
    assert np.abs(last - (250, 0, 0)).max() < 12
    histogram = Image.open(tmp_path / "dst" / "class_histogram.png")
    assert histogram.size == (1200, 260)
