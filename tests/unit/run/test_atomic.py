"""Files replaced whole: what a disk that fails or a power cut leaves."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from resnet_dist.run.atomic import temporary_name, write_atomically


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_text_and_bytes_make_and_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["known.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "known.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["known.json"]


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "known.json", []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        at = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append("directory" if at == tmp_path else at.read_text())
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(path, "whole")
    assert done == ["whole", "rename", "directory"]


def test_temporary_names_are_hidden_apart_and_no_name_that_tensorboard_reads(
        tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.host"
    names = {temporary_name(path).name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".") and "tfevents" not in name for name in names)
