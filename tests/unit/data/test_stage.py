"""Staging to scratch: once a node, checked, used again, safe against kills."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch

from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.loader import TrainLoader
from resnet_dist.data.shards import stage as stage_module
from resnet_dist.data.shards.manifest import load_manifest
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.data.shards.stage import ReadAhead, stage
from tests.unit.data.samples import jpeg_sample, write_dataset

RRC = AugmentConfig(name="random_resized_crop", size=32)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    samples = [jpeg_sample(i, 0, 60, 60) for i in range(12)]
    return write_dataset(tmp_path / "d", {"train": [samples[:4], samples[4:8], samples[8:]]})


def staged(dataset: Path, scratch: Path) -> Path:
    return stage(dataset, load_manifest(dataset), "train", scratch)


def test_training_from_scratch_reads_the_same_pixels(dataset, tmp_path):
    options = {"seed": 3, "batch_size": 4, "threads": 1}
    with TrainLoader(dataset, "train", RRC, **options) as plain, \
            TrainLoader(dataset, "train", RRC, **options, stage_dir=tmp_path / "s") as local:
        assert str(tmp_path / "s") in local.reader.describe(0)
        for a, b, _ in zip(plain, local, range(4), strict=False):
            assert torch.equal(a.images, b.images)


def test_what_is_there_is_used_again_and_nothing_else_is_left(dataset, tmp_path):
    root = staged(dataset, tmp_path / "s")
    files = sorted(root.rglob("*.beton"))
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    told = []
    stage(dataset, load_manifest(dataset), "train", tmp_path / "s",
          lambda done, total: told.append((done, total)))
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == before
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [
        f"shard-{i:05d}.beton" for i in range(3)]
    total = sum(file.stat().st_size for file in files)
    assert told[-1] == (total, total)


def test_a_shard_that_does_not_match_its_hash_is_not_staged(dataset, tmp_path):
    file = dataset / "train" / "shard-00001.beton"
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00001\.beton: its SHA-256"):
        staged(dataset, tmp_path / "s")
    assert not list((tmp_path / "s").rglob("shard-00001.beton"))


def test_a_scratch_that_is_too_small_or_no_folder_is_refused(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.stage_dir"):
        staged(dataset, tmp_path / "file" / "s")
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(DataError, match=r"needs .* GB more and 0\.0 GB are free"):
        staged(dataset, tmp_path / "s")


class _Usage:
    free = 1000


def test_processes_that_start_together_copy_once(dataset, tmp_path, monkeypatch):
    copies = tmp_path / "copies"
    copy = stage_module._copy

    def counted(source: Path, target: Path) -> str:
        with open(copies, "a") as stream:  # one short line, from any process, whole
            stream.write(f"{source.name}\n")
        time.sleep(0.05)  # the others arrive meanwhile
        return copy(source, target)

    monkeypatch.setattr(stage_module, "_copy", counted)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=staged, args=(dataset, tmp_path / "s")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert sorted(copies.read_text().split()) == [f"shard-{i:05d}.beton" for i in range(3)]
    with ShardReader(dataset, "train", root=staged(dataset, tmp_path / "s")) as reader:
        assert reader.num_samples == 12


def staged_and_killed(dataset: Path, scratch: Path, line: int) -> None:
    """Stage, and SIGKILL this process before the `line`-th line of stage.py that it runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal count
        if frame.f_code.co_filename != stage_module.__file__:
            return None
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    staged(dataset, scratch)


def test_a_kill_at_any_moment_leaves_a_scratch_that_works(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    expected = [file.read_bytes() for file in sorted((dataset / "train").iterdir())]
    copied = set()
    for line in range(1, 1000, 5):
        scratch = tmp_path / f"s{line}"
        worker = context.Process(target=staged_and_killed, args=(dataset, scratch, line))
        worker.start()
        worker.join(60)
        files = sorted(scratch.rglob("*.beton"))
        assert [file.read_bytes() for file in files] == expected[:len(files)]  # a name is whole
        copied.add(len(files))
        root = staged(dataset, scratch)
        assert [file.read_bytes() for file in sorted((root / "train").glob("*.beton"))] == expected
        if worker.exitcode == 0:
            break
        assert worker.exitcode == -signal.SIGKILL
    else:
        pytest.fail("never ran to its end")
    assert copied == {0, 1, 2, 3}


def resident(reader: ShardReader) -> float:
    """Share of the images' pages that are in memory."""
    libc, page, found = ctypes.CDLL(None), os.sysconf("SC_PAGE_SIZE"), []
    for shard in reader.shards:
        with open(reader.dataset / shard.file, "rb") as file, \
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            pages = np.zeros(-(-shard.bytes // page), np.uint8)
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(shard.bytes),
                         pages.ctypes.data_as(ctypes.c_void_p))
            found.append(pages & 1)
    counts = []
    for sample in range(reader.num_samples):
        start = int(reader.metadata["f0"]["data_ptr"][sample])
        index = next(i for i, first in enumerate(reader.first_sample[1:]) if sample < first)
        counts.append(found[index][start // page:(start + int(reader.sizes[sample])) // page + 1])
    return float(np.concatenate(counts).mean())


def test_read_ahead_brings_cold_pages_in_and_ends_with_its_reader(dataset):
    for file in (dataset / "train").iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ShardReader(dataset, "train") as reader:
        if resident(reader) > 0.5:
            pytest.skip("this file system keeps its pages")
        before = threading.active_count()
        ahead = ReadAhead(reader)
        ahead.want(np.arange(12))
        deadline = time.monotonic() + 20
        while resident(reader) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        ahead.close()
        assert resident(reader) == 1
        assert threading.active_count() == before


def test_the_second_user_of_a_scratch_has_a_folder_of_his_own(dataset, tmp_path, monkeypatch):
    first = staged(dataset, tmp_path / "s")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert staged(dataset, tmp_path / "s") != first
