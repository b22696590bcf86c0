"""Where images come from: what kind of source a path is, and class-folder trees.

Splits are found from top folders (train; val, valid, validation, test), classes from the folders
below them; nothing is extracted to disk.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.archives import Ilsvrc, SpanReader, TarFolders, WebDataset, look_into
from data_prep.sources.arrays import Cifar, CifarReader, DigitReader, Digits
from data_prep.sources.found import (
    HELD_OUT_NAMES,
    IMAGE_SUFFIXES,
    TRAIN_NAMES,
    Found,
    Group,
    Reader,
    Source,
    Unreadable,
    refuse_size,
    split_names,
    suffix_of,
)
from data_prep.sources.parquet import ParquetFiles, ParquetReader
from data_prep.sources.tars import SourceError, is_tar_name


class Tree:
    """A directory of class folders, possibly below train/ and val/."""

    kind = "folders"
    pixels = False
    classes = None
    default_val_fraction = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: Counter[str] = Counter()
        self.reader: dict[str, Any] = {"reader": "files", "containers": [str(root.resolve())]}
        self._empty: list[str] = []

    def scan(self) -> Iterator[Found]:
        for name, entries in _walk(self.root):
            images = [entry for entry in entries if Path(entry).suffix.lower() in IMAGE_SUFFIXES
                      and not entry.startswith(".")]
            self.ignored.update(map(suffix_of, set(entries).difference(images)))
            if not images and name:
                self._empty.append(name)
            for entry in images:
                yield Found(name, f"{name}/{entry}" if name else entry, 0, 0, -1)

    def empty_groups(self) -> list[str]:
        return self._empty

    def fingerprint(self) -> dict[str, Any]:
        return {"root": str(self.root.resolve())}


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to root, names of regular files in it), sorted; symbolic links to folders
    are followed only above the classes, so that a loop cannot trap the scan."""
    stack = [("", 0)]
    while stack:
        name, depth = stack.pop()
        files, folders = [], []
        with os.scandir(root / name) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=depth < 2):
                        if not entry.name.startswith(".") and entry.name != "__MACOSX":
                            folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
                except OSError as error:
                    raise SourceError(f"{entry.path}: {error.strerror}") from None
        yield name, sorted(files)
        stack += [(f"{name}/{folder}" if name else folder, depth + 1)
                  for folder in sorted(folders, reverse=True)]


class FileReader:
    def __init__(self, reader: dict[str, Any], max_bytes: int) -> None:
        self._roots: list[str] = reader["containers"]
        self._max_bytes = max_bytes
        self._opened: dict[tuple[int, str], int] = {}  # by `soon`, not read yet

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        try:
            handle = self._opened.pop((container, name), -1)
            if handle < 0:
                handle = self._open(name, container)
            try:
                length = os.fstat(handle).st_size
                refuse_size(length, self._max_bytes)
                data = os.read(handle, length + 1)
                while len(data) < length and (more := os.read(handle, length - len(data))):
                    data += more
                return data
            finally:
                os.close(handle)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None

    def soon(self, name: str, container: int) -> None:
        with suppress(OSError):  # `read` will say so
            if (container, name) not in self._opened:
                handle = self._opened[container, name] = self._open(name, container)
                os.posix_fadvise(handle, 0, self._max_bytes, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str, container: int) -> int:
        return os.open(os.path.join(self._roots[container], name), os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:  # of a conversion that was given up
        for handle in self._opened.values():
            os.close(handle)


def open_source(source: str) -> Source:
    """What `source` is. Raises: SourceError with what would have been understood."""
    if source == "digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return ParquetFiles([path])
        if is_tar_name(path.name):
            return _open_tars([path])
    matches = [Path(match) for match in sorted(glob.glob(source))] if "*" in source else []
    if matches and all(match.suffix.lower() == ".parquet" for match in matches):
        return ParquetFiles(matches)
    if matches and all(is_tar_name(match.name) for match in matches):
        return _open_tars(matches)
    if not path.exists() and not matches:
        raise SourceError(f"SOURCE = {source}: no such file or directory, and not 'digits'")
    raise SourceError(f"SOURCE = {source}: is none of: a directory of class folders, of ILSVRC2012 "
                      "tars, of Parquet or WebDataset files; a .tar (.gz, .bz2, .xz, .zst) or "
                      ".parquet file, or a pattern with '*' for several; CIFAR's archives; "
                      "'digits'")


def _open_directory(path: Path) -> Source:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    if Cifar.members_in(names):
        return Cifar(path)
    tars = [path / name for name in names if is_tar_name(name)]
    if tars:
        return _open_tars(tars)
    parquet = _in_split_folders(path, (".parquet",))
    if parquet:
        return ParquetFiles(parquet)
    shards = _in_split_folders(path, (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst"))
    if shards:
        return _open_tars(shards)
    return Tree(path)


def _in_split_folders(path: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files with these endings in `path` or in its folders named after splits or data; a folder
    is taken for one of classes, and not searched, once it holds a folder of its own."""
    found = []
    for folder in [path, *(path / name for name in ("data", *TRAIN_NAMES, *HELD_OUT_NAMES))]:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir() and folder != path:
                        break
                    if entry.name.endswith(endings) and entry.is_file():
                        found.append(folder / entry.name)
    return sorted(found)


def _open_tars(paths: list[Path]) -> Source:
    images = [path for path in paths if "devkit" not in path.name]
    if not images:
        raise SourceError(f"SOURCE = {paths[0]}: is a development kit; name the folder with the "
                          "image archives beside it")
    kinds = {path: look_into(path) for path in (images[:1] if len(images) > 8 else images)}
    kind = next(iter(kinds.values()))
    if any(found in ("ilsvrc-train", "ilsvrc-val") for found in kinds.values()):
        return Ilsvrc([path for path, found in kinds.items() if found.startswith("ilsvrc")])
    if kind == "webdataset":
        return WebDataset(images)
    if len(images) > 1:
        return TarFolders(images, class_from_name=kind == "flat")
    if kind == "cifar":
        return Cifar(images[0])
    return TarFolders(images)


def open_reader(reader: dict[str, Any], max_bytes: int) -> Reader:
    kind = reader["reader"]
    if kind == "files":
        return FileReader(reader, max_bytes)
    if kind == "spans":
        return SpanReader(reader, max_bytes)
    if kind == "parquet":
        return ParquetReader(reader, max_bytes)
    if kind == "cifar":
        return CifarReader(reader)
    assert kind == "digits", kind
    return DigitReader()


@dataclass(frozen=True)
class Place:
    """What a group of images is: its split and class."""

    split: str
    class_name: str


def place_groups(groups: Sequence[Group], split: str | None,
                 name: str) -> list[Place | None]:
    """Split and class of every group; None for folders that are above the classes.

    Folder names are read as [wrappers/] [split/] class [/deeper]. A single top folder that is no
    split and holds folders is a wrapper. `split` names the split where no folder does.
    Raises: SourceError where images lie outside class folders.
    """
    folders = [tuple(group.split("/")) if group else () for group in groups
               if isinstance(group, str)]
    depth = 0
    while True:
        tops = {folder[depth] for folder in folders if len(folder) > depth}
        at_top = any(len(folder) == depth for folder in folders)
        if len(tops) != 1 or at_top or split_names(tops):
            break
        if not all(len(folder) > depth + 1 for folder in folders):
            break  # the only folder holds images: it is a class
        depth += 1
    found = {folder[depth].lower() for folder in folders if len(folder) > depth + 1
             and split_names([folder[depth]])}
    names = split_names(found)

    def place(group: Group) -> Place | None:
        if not isinstance(group, str):
            return Place(split or group[0], group[1])
        parts = group.split("/")[depth:] if group else []
        if not parts:
            return None
        if found and parts[0].lower() in names:
            return Place(names[parts[0].lower()], parts[1]) if len(parts) > 1 else None
        if found:
            return None
        return Place(split or "train", parts[0])

    if split is not None and len({names[top] for top in found}) > 1:
        raise SourceError(f"split = {split}: {name} has split folders of its own; drop the option")
    places = [place(group) for group in groups]
    if split is not None:
        places = [Place(split, known.class_name) if known else None for known in places]
    return places
