"""Where images come from: what kind of source a path is, and trees of folders.

What the folders mean is for `readings` to say; nothing is extracted to disk.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.sources.archives import Ilsvrc, SpanReader, TarFolders, WebDataset, look_into
from data_prep.sources.arrays import Cifar, CifarReader, DigitReader, Digits
from data_prep.sources.found import (
    LABEL_SUFFIXES,
    Found,
    Located,
    Reader,
    Source,
    SourceError,
    Unreadable,
    is_image_name,
    is_machine_folder,
    refuse_size,
    suffix_of,
)
from data_prep.sources.parquet import ParquetFiles, ParquetReader
from data_prep.sources.remote import Remote, RemoteTree, UrlReader, is_url
from data_prep.sources.zips import is_archive_name

FEW_FOLDERS = 8  # of which each may hold archives or splits


class Tree(Source):
    """A directory of folders. Links to folders are followed; one that leads back to a folder above
    it holds nothing new."""

    kind = "folders"

    def __init__(self, root: Path) -> None:
        super().__init__([root], reader="files")
        self.root = root
        self._empty: list[str] = []

    def scan(self) -> Iterator[Found]:
        for name, entries in self._walk():
            images = 0
            for entry in entries:
                path = f"{name}/{entry}" if name else entry
                if is_image_name(entry):
                    images += 1
                    yield Found(name, path, 0, 0, -1)
                    continue
                self.ignored[suffix_of(entry)] += 1
                if Path(entry).suffix.lower() in LABEL_SUFFIXES:
                    self.side[path] = partial(_head, self.root / path)
            if not images and name:
                self._empty.append(name)

    def _walk(self) -> Iterator[tuple[str, list[str]]]:
        """(folder relative to the root, names of what is no folder in it), sorted."""
        stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while stack:
            name, above = stack.pop()
            files, folders = [], []
            try:
                facts = os.stat(self.root / name)
                here = (*above, (facts.st_dev, facts.st_ino))
                with os.scandir(self.root / name) as entries:
                    for entry in entries:
                        if not entry.is_dir():
                            if entry.is_file() or not os.path.exists(entry.path):
                                files.append(entry.name)  # dangling links, too: reading tells
                            else:
                                self.ignored["no regular file"] += 1
                        elif is_machine_folder(entry.name):
                            self.ignored[f"{entry.name}/"] += 1
                        elif entry.is_symlink() and _identity(entry) in here:
                            self.ignored["link to a folder above"] += 1
                        else:
                            folders.append(entry.name)
            except OSError as error:
                raise SourceError(f"{self.root / name}: {error.strerror}") from None
            yield name, sorted(files)
            stack += [(f"{name}/{folder}" if name else folder, here)
                      for folder in sorted(folders, reverse=True)]

    def empty_groups(self) -> list[str]:
        return self._empty

    def fingerprint(self) -> dict[str, Any]:
        return {"root": str(self.root.resolve())}


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    facts = entry.stat()
    return facts.st_dev, facts.st_ino


def _head(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(limit)


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


def open_source(source: str, take: str | None = None) -> Source:
    """What `source` is. Raises: SourceError with what would have been understood.

    Args:
        take: "folders" or "archives", where a directory holds both.
    """
    if source == "digits":
        return Digits()
    if is_url(source):
        return _open_remote(Remote(source))
    path = Path(source)
    if path.is_dir():
        return _open_directory(path, take)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return ParquetFiles([path])
        if is_archive_name(path.name):
            return _open_archives([path])
    matches = [Path(match) for match in sorted(glob.glob(source))] if "*" in source else []
    if matches and all(match.suffix.lower() == ".parquet" for match in matches):
        return ParquetFiles(matches)
    if matches and all(is_archive_name(match.name) for match in matches):
        return _open_archives(matches)
    if not path.exists() and not matches:
        raise SourceError(f"SOURCE = {source}: no such file or directory, and not 'digits'")
    raise SourceError(f"SOURCE = {source}: is none of: a directory of class folders, of ILSVRC2012 "
                      "tars, of Parquet or WebDataset files; a .tar (.gz, .bz2, .xz, .zst), .zip "
                      "or .parquet file, or a pattern with '*' for several; CIFAR's archives; a "
                      "URL of any of these; 'digits'")


def _open_directory(path: Path, take: str | None) -> Source:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    if Cifar.members_in(names):
        return Cifar(path)
    archives = [path / name for name in names if is_archive_name(name)]
    if not archives:
        near = list(_files_near(path))
        archives = [file for file in near if file.suffix.lower() == ".parquet"] or [
            file for file in near if is_archive_name(file.name)]
    if not archives or take == "folders":
        return Tree(path)
    if take is None and (image := _image_below(path)):
        raise SourceError(f"SOURCE = {path}: holds images in folders, e.g. {image}, and archives, "
                          f"e.g. {archives[0].relative_to(path)}. take=folders converts the "
                          "former, take=archives the latter")
    if archives[0].suffix.lower() == ".parquet":
        return ParquetFiles(archives)
    return _open_archives(archives)


def _open_remote(place: Remote) -> Source:
    """What lies behind a URL. Raises: SourceError."""
    if place.suffix.lower() == ".parquet":
        place.stat()  # says where nothing is there
        return ParquetFiles([place])
    if is_archive_name(place.name):
        return _open_archives([place])
    files = place.files()
    if not files:
        raise SourceError(f"SOURCE = {place}: nothing is there, or nothing can be listed")
    tables = [Remote(f"{place}/{name}") for name, _ in files if name.endswith(".parquet")]
    if tables:
        return ParquetFiles(tables)
    archives = [Remote(f"{place}/{name}") for name, _ in files if is_archive_name(name)]
    if archives and any(is_image_name(name) for name, _ in files):
        raise SourceError(f"SOURCE = {place}: holds images in folders and archives, e.g. "
                          f"{archives[0]}; name the folder or the archive that is meant")
    return _open_archives(archives) if archives else RemoteTree(place, files)


def _files_near(path: Path, depth: int = 2) -> Iterator[Path]:
    """Files in `path` and in its folders, sorted; folders among many are classes, and are not
    searched."""
    entries = sorted(path.iterdir())
    yield from (entry for entry in entries if entry.is_file())
    folders = [entry for entry in entries if entry.is_dir() and not is_machine_folder(entry.name)]
    if depth and len(folders) <= FEW_FOLDERS:
        for folder in folders:
            yield from _files_near(folder, depth - 1)


def _image_below(path: Path) -> str | None:
    """An image in a folder of `path` or of its folders, as far as a look into a few tells."""
    folders = [entry for entry in sorted(path.iterdir())
               if entry.is_dir() and not is_machine_folder(entry.name)]
    for folder in folders[:FEW_FOLDERS]:
        for place, inner, files in os.walk(folder):
            inner[:] = sorted(name for name in inner if not is_machine_folder(name))[:4]
            for name in sorted(files):
                if is_image_name(name):
                    return str((Path(place) / name).relative_to(path))
    return None


def _open_archives(paths: Sequence[Located]) -> Source:
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
    if kind == "cifar" and len(images) == 1 and isinstance(images[0], Path):
        return Cifar(images[0])
    return TarFolders(images)


def open_reader(reader: dict[str, Any], max_bytes: int) -> Reader:
    kind = reader["reader"]
    if kind == "files":
        return FileReader(reader, max_bytes)
    if kind == "spans":
        return SpanReader(reader, max_bytes)
    if kind == "urls":
        return UrlReader(reader, max_bytes)
    if kind == "parquet":
        return ParquetReader(reader, max_bytes)
    if kind == "cifar":
        return CifarReader(reader)
    assert kind == "digits", kind
    return DigitReader()
