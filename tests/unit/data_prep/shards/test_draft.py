"""A shard's file that is written while its images are still being encoded."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.shards import draft
from data_prep.shards.beton import MODE_RAW, SMALL_SHARD, USUAL_PAGE, Stored, read_index
from data_prep.shards.draft import Draft
from tests.unit.data_prep.material import resident


def images(count: int, size: int) -> list[Stored]:
    heights = [size // 300 + number % 7 for number in range(count)]
    return [Stored(MODE_RAW, 100, height, bytes([number % 251]) * (300 * height), number)
            for number, height in enumerate(heights)]


def committed(path: Path, samples: list[Stored], planned: int, early: bool) -> tuple[int, str, str]:
    with ThreadPoolExecutor(1) as disk:
        made = Draft(path, planned, disk if early else None)
        for sample in samples:
            made.add(sample)
        assert bool(made._jobs) == (early and sum(len(s.data) for s in samples) > SMALL_SHARD
                                    + USUAL_PAGE)
        return made.commit()


MANY = images(70, 800_000)
METADATA_OF_A_PAGE = 262_200  # planned samples whose rows alone fill a page
HUGE = [*MANY, *images(1, USUAL_PAGE + 300)]  # found last: every page must be larger


@pytest.mark.parametrize(("samples", "planned"), [
    (MANY, 70), (MANY, 71), (MANY, METADATA_OF_A_PAGE), (HUGE, 71), (images(3, 999), 3)],
    ids=["as guessed", "one rejected", "so many rejected that the data moves", "larger pages",
         "small"])
def test_what_is_written_early_changes_no_byte(tmp_path, samples, planned):
    early = committed(tmp_path / "early.beton", samples, planned, True)
    late = committed(tmp_path / "late.beton", samples, planned, False)
    data = (tmp_path / "early.beton").read_bytes()
    assert early == late
    assert data == (tmp_path / "late.beton").read_bytes()
    assert early[:2] == (len(data), hashlib.sha256(data).hexdigest())
    index = read_index(tmp_path / "early.beton")
    for sample, pointer in zip(samples, index.pointers.tolist(), strict=True):
        assert data[pointer:pointer + len(sample.data)] == sample.data
    assert sorted(os.listdir(tmp_path)) == ["early.beton", "late.beton"]


def refused_at_open(monkeypatch) -> None:
    usual = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)


def refused_at_write(monkeypatch) -> None:
    def refuse(handle, data, at):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)


@pytest.mark.parametrize("refuse", [refused_at_open, refused_at_write])
def test_a_file_system_that_needs_the_page_cache_gets_the_same_bytes(refuse, tmp_path, monkeypatch):
    usual = committed(tmp_path / "usual.beton", MANY, 70, True)
    refuse(monkeypatch)
    assert committed(tmp_path / "cached.beton", MANY, 70, True) == usual
    assert (tmp_path / "cached.beton").read_bytes() == (tmp_path / "usual.beton").read_bytes()


def test_most_of_a_shard_never_enters_the_page_cache(tmp_path):
    path = tmp_path / "shard.beton"
    committed(path, MANY, 70, True)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system cannot write past the page cache")
    assert resident(path) < 1 / 3


@pytest.mark.parametrize("call", ["pwritev", "pwrite", "fdatasync", "fsync"])
def test_a_full_disk_is_an_error_and_leaves_no_file(call, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if call == "fdatasync":  # only what goes through the page cache needs it
        refused_at_open(monkeypatch)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        committed(tmp_path / "full.beton", MANY, 70, True)
    assert not os.listdir(tmp_path)


def test_a_system_that_takes_little_at_once_gets_everything(tmp_path, monkeypatch):
    whole = committed(tmp_path / "whole.beton", MANY, 70, True)
    vector, plain = os.pwritev, os.pwrite
    monkeypatch.setattr(draft.os, "pwritev",
                        lambda handle, data, at: vector(handle, [data[0][:1000]], at))
    monkeypatch.setattr(draft.os, "pwrite",
                        lambda handle, data, at: plain(handle, data[:1 << 20], at))
    assert committed(tmp_path / "parts.beton", MANY, 70, True) == whole
    assert (tmp_path / "parts.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()


def test_a_discarded_draft_leaves_no_file(tmp_path):
    with ThreadPoolExecutor(1) as disk:
        made = Draft(tmp_path / "never.beton", 70, disk)
        for sample in MANY:
            made.add(sample)
        made._jobs[0].result()
        assert os.listdir(tmp_path)
        made.discard()
    made.discard()
    assert not os.listdir(tmp_path)
