"""The disk is asked for images before they are needed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_prep.conversion.write import AHEAD
from data_prep.convert import convert
from data_prep.sources.folders import FileReader
from data_prep.sources.found import Unreadable
from tests.unit.data_prep.material import make_tree, options, resident


def reader_of(root: Path) -> FileReader:
    return FileReader({"reader": "files", "containers": [str(root)]}, 1 << 20)


def forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def test_what_will_be_read_soon_is_brought_into_the_page_cache(tmp_path):
    file = tmp_path / "image.jpg"
    file.write_bytes(os.urandom(300_000))
    forget(file)
    if resident(file):
        pytest.skip("the file system has nothing but a page cache")
    reader = reader_of(tmp_path)
    reader.soon("image.jpg", 0)
    deadline = time.monotonic() + 10
    while resident(file) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(file) == 1
    assert reader.read("image.jpg", 0, 0, -1) == file.read_bytes()


def test_reading_ahead_neither_hides_a_missing_file_nor_keeps_files_open(tmp_path):
    names = [f"{number}.jpg" for number in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    before = set(os.listdir("/proc/self/fd"))
    reader = reader_of(tmp_path)
    for name in (*names, names[0], "missing.jpg"):
        reader.soon(name, 0)
    assert [reader.read(name, 0, 0, -1) for name in names[:4]] == [
        name.encode() for name in names[:4]]
    with pytest.raises(Unreadable, match="No such file"):
        reader.read("missing.jpg", 0, 0, -1)
    del reader  # as when a conversion is given up before the last one
    assert set(os.listdir("/proc/self/fd")) == before


def test_every_image_but_the_first_ones_is_asked_for_ahead(tmp_path, monkeypatch):
    make_tree(tmp_path / "source", per_class=7)
    order: list[tuple[str, str]] = []
    soon, read = FileReader.soon, FileReader.read

    def noted_soon(self, name, container):
        order.append(("soon", name))
        soon(self, name, container)

    def noted_read(self, name, *place):
        order.append(("read", name))
        return read(self, name, *place)

    monkeypatch.setattr(FileReader, "soon", noted_soon)
    monkeypatch.setattr(FileReader, "read", noted_read)
    convert(str(tmp_path / "source"), tmp_path / "out", options("workers=1"))
    names = [name for what, name in order if what == "read"]
    asked = [name for what, name in order if what == "soon"]
    assert len(names) == 2 * 21  # a shard a split
    assert len(asked) == 2 * (21 - AHEAD)
    for name in asked:
        assert names.index(name) - sum(
            what == "read" for what, _ in order[:order.index(("soon", name))]) == AHEAD
