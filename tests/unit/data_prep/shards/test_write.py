"""A shard's file, however the file system takes its bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from data_prep.shards.write import USUAL_PAGE, Stored, write_shard
from resnet_dist.data.shards.beton import MODE_RAW, read_index
from tests.unit.data_prep.material import resident


def images(count: int, size: int) -> list[Stored]:
    heights = [size // 300 + number % 7 for number in range(count)]
    return [Stored(MODE_RAW, 100, height, bytes([number % 251]) * (300 * height), number)
            for number, height in enumerate(heights)]


MANY = images(70, 800_000)
HUGE = [*MANY, *images(1, USUAL_PAGE + 300)]  # every page must be larger


@pytest.mark.parametrize("samples", [MANY, HUGE, images(3, 999)],
                         ids=["many", "larger pages", "small"])
def test_the_file_is_what_is_told_of_it(tmp_path, samples):
    path = tmp_path / "shard.beton"
    told = write_shard(path, samples)
    data = path.read_bytes()
    assert told[:2] == (len(data), hashlib.sha256(data).hexdigest())
    with open(path, "rb") as file:
        index = read_index(file.fileno())
    for sample, pointer in zip(samples, index.pointers.tolist(), strict=True):
        assert data[pointer:pointer + len(sample.data)] == sample.data
    assert os.listdir(tmp_path) == ["shard.beton"]


def refused_when_asked(monkeypatch) -> None:
    usual = fcntl.fcntl

    def refuse(handle, what, flags=0):
        if what == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual(handle, what, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refused_at_write(monkeypatch) -> None:
    usual = os.write

    def refuse(handle, data):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual(handle, data)

    monkeypatch.setattr(os, "write", refuse)


@pytest.mark.parametrize("refuse", [refused_when_asked, refused_at_write])
def test_a_file_system_that_needs_the_page_cache_gets_the_same_bytes(refuse, tmp_path, monkeypatch):
    usual = write_shard(tmp_path / "usual.beton", MANY)
    refuse(monkeypatch)
    assert write_shard(tmp_path / "cached.beton", MANY) == usual
    assert (tmp_path / "cached.beton").read_bytes() == (tmp_path / "usual.beton").read_bytes()


def test_most_of_a_shard_never_enters_the_page_cache(tmp_path):
    path = tmp_path / "shard.beton"
    write_shard(path, MANY)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system cannot write past the page cache")
    assert resident(path) < 1 / 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_an_error_and_leaves_no_file(call, number, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_shard(Path(tmp_path / "full.beton"), MANY)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("most", [1000, 1 << 20])
def test_a_system_that_takes_little_at_once_gets_everything(most, tmp_path, monkeypatch):
    samples = MANY[:10]
    whole = write_shard(tmp_path / "whole.beton", samples)
    usual = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: usual(handle, data[:most]))
    assert write_shard(tmp_path / "parts.beton", samples) == whole
    assert (tmp_path / "parts.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
