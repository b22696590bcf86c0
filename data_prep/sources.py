"""Where images come from: what kind of source a path is, what it holds, and how to read one image.

A source is scanned once, in its own order: every image gets a place (container, offset, size) from
which any worker can read it later without reading the others. What a worker needs for that is plain
data (`Source.reader`), which travels in the plan.

Splits are found from top folders (train; val, valid, validation, test), classes from the folders
below them; nothing is extracted to disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_prep import tars
from data_prep.tars import SourceError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib",
                            ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"})
TRAIN_FOLDERS = frozenset({"train", "training"})
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")  # the first that exists is the val split


class Found(NamedTuple):
    """One image of a source. `group` is a folder's name, or (split, class) where both are known."""

    group: str | tuple[str, str]
    name: str  # unique in the source; what messages and rejected.jsonl call it
    container: int  # index into the reader's containers
    offset: int
    size: int  # bytes; -1 where only opening the file tells


class Source(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def pixels(self) -> bool:
        """It gives RGB arrays, not files."""
        ...
    @property
    def classes(self) -> tuple[str, ...] | None:
        """Fixed order of labels; None: sorted names."""
        ...
    @property
    def default_val_fraction(self) -> float | None: ...
    @property
    def ignored(self) -> int:
        """Files seen by the scan that are no images, by name."""
        ...
    @property
    def reader(self) -> dict[str, Any]:
        """What `open_reader` needs, as plain data."""
        ...

    def scan(self) -> Iterator[Found]: ...
    def empty_groups(self) -> list[str]: ...
    def fingerprint(self) -> dict[str, Any]: ...


class Reader(Protocol):
    """Reads images of a scanned source; one a process."""

    def read(self, name: str, container: int, offset: int, size: int) -> bytes | np.ndarray:
        """The encoded file, or uint8 RGB [height, width, 3]. Raises: Unreadable."""
        ...


class Unreadable(ValueError):
    """One image cannot be had; the message is its reason in rejected.jsonl."""


# --- folders -------------------------------------------------------------------------------------

class Tree:
    """A directory of class folders, possibly below train/ and val/."""

    kind = "folders"
    pixels = False
    classes = None
    default_val_fraction = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored = 0
        self.reader: dict[str, Any] = {"reader": "files", "containers": [str(root.resolve())]}
        self._empty: list[str] = []

    def scan(self) -> Iterator[Found]:
        for name, entries in _walk(self.root):
            images = [entry for entry in entries if Path(entry).suffix.lower() in IMAGE_SUFFIXES
                      and not entry.startswith(".")]
            self.ignored += len(entries) - len(images)
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
        self._roots = [Path(root) for root in reader["containers"]]
        self._max_bytes = max_bytes

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        try:
            with open(self._roots[container] / name, "rb") as file:
                _refuse_size(os.fstat(file.fileno()).st_size, self._max_bytes)
                return file.read(self._max_bytes + 1)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None


def _refuse_size(size: int, limit: int) -> None:
    if size > limit:
        raise Unreadable(f"has {size} bytes, more than max_image_bytes = {limit}")


# --- tars of class folders -----------------------------------------------------------------------

class TarFolders:
    """One tar of class folders, plain or compressed."""

    kind = "tar"
    pixels = False
    classes = None
    default_val_fraction = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored = 0
        self.reader: dict[str, Any] = {"reader": "spans", "containers": [str(path.resolve())]}
        self._folders: set[str] = set()
        self._seen: set[str] = set()

    def scan(self) -> Iterator[Found]:
        data = tars.open_bytes(self.path)
        try:
            for member in tars.members(data):
                folder = member.name.rpartition("/")[0]
                if member.kind == "directory" and member.name not in ("", "."):
                    self._folders.add(member.name)
                elif member.kind == "file" and is_image_name(member.name):
                    self._seen.add(folder)
                    yield Found(folder, member.name, 0, member.offset, member.size)
                elif member.kind != "directory":
                    self.ignored += 1
        finally:
            data.close()

    def empty_groups(self) -> list[str]:
        return sorted(self._folders - self._seen)

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint([self.path])


def is_image_name(name: str) -> bool:
    """By its ending; hidden files and macOS' doubles are none."""
    folder, _, leaf = name.rpartition("/")
    return (bool(name) and not leaf.startswith(".") and not folder.startswith("__MACOSX")
            and os.path.splitext(leaf)[1].lower() in IMAGE_SUFFIXES)


class SpanReader:
    """Images that lie as bytes inside plain or compressed files."""

    def __init__(self, reader: dict[str, Any], max_bytes: int) -> None:
        self._paths = [Path(path) for path in reader["containers"]]
        self._open: dict[int, tars.Bytes] = {}
        self._max_bytes = max_bytes

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        _refuse_size(size, self._max_bytes)
        if container not in self._open:
            while len(self._open) >= 16:
                self._open.pop(next(iter(self._open))).close()
            self._open[container] = tars.open_bytes(self._paths[container])
        data = self._open[container].read_at(offset, size)
        if len(data) < size:
            raise SourceError(f"{self._paths[container]}: is shorter than when it was scanned")
        return data


def file_fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    """Names, sizes and times: a source that was replaced while a conversion was interrupted is
    noticed without reading it all."""
    return {"files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
                      for path in paths]}


# --- the digits ----------------------------------------------------------------------------------

DIGIT_SIDE = 32


class Digits:
    """1,797 handwritten digits that scikit-learn carries: 8 x 8 pixels, 17 levels.

    Each pixel becomes 4 x 4 equal ones and the level n becomes round(n * 255 / 16), so that a
    network made for CIFAR's 32 x 32 takes them and nothing is invented by interpolation.
    Source: Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
    """

    kind = "digits"
    pixels = True
    classes = tuple(str(digit) for digit in range(10))
    default_val_fraction: float | None = 0.2

    def __init__(self) -> None:
        self.ignored = 0
        self.reader: dict[str, Any] = {"reader": "digits"}

    def scan(self) -> Iterator[Found]:
        from sklearn.datasets import load_digits

        for index, label in enumerate(load_digits().target):
            yield Found(("train", str(label)), f"digit-{index:04d}", 0, index, -1)

    def empty_groups(self) -> list[str]:
        return []

    def fingerprint(self) -> dict[str, Any]:
        return {"digits": "scikit-learn", "side": DIGIT_SIDE}


class DigitReader:
    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        levels = load_digits().images
        self._images = np.round(levels * (255 / 16)).astype(np.uint8)

    def read(self, name: str, container: int, offset: int, size: int) -> np.ndarray:
        enlarge = DIGIT_SIDE // 8
        gray = self._images[offset].repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        return np.repeat(gray[:, :, None], 3, axis=2)


# --- choosing ------------------------------------------------------------------------------------

def open_source(source: str) -> Source:
    """What `source` is. Raises: SourceError with what would have been understood."""
    if source == "digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        return Tree(path)
    if path.is_file() and tars.is_tar_name(path.name):
        return TarFolders(path)
    if not path.exists():
        raise SourceError(f"SOURCE = {source}: no such file or directory, and not 'digits'")
    raise SourceError(f"SOURCE = {source}: give a directory of class folders, a .tar (.gz, .bz2, "
                      ".xz, .zst) of class folders, or 'digits'")


def open_reader(reader: dict[str, Any], max_bytes: int) -> Reader:
    kind = reader["reader"]
    if kind == "files":
        return FileReader(reader, max_bytes)
    if kind == "spans":
        return SpanReader(reader, max_bytes)
    assert kind == "digits", kind
    return DigitReader()


@dataclass(frozen=True)
class Place:
    """What a group of images is: its split and class."""

    split: str
    class_name: str


def place_groups(groups: Sequence[str | tuple[str, str]], split: str | None,
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
        if len(tops) != 1 or at_top or _split_kind(next(iter(tops))) is not None:
            break
        if not all(len(folder) > depth + 1 for folder in folders):
            break  # the only folder holds images: it is a class
        depth += 1
    found = {folder[depth].lower() for folder in folders if len(folder) > depth + 1
             and _split_kind(folder[depth])}
    held_out = [known for known in HELD_OUT_FOLDERS if known in found]
    names = {top: "train" for top in TRAIN_FOLDERS}
    names |= {top: "val" if top == held_out[0] else top for top in held_out}

    def place(group: str | tuple[str, str]) -> Place | None:
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

    if split is not None and len({names[top] for top in found if top in names}) > 1:
        raise SourceError(f"split = {split}: {name} has split folders of its own; drop the option")
    places = [place(group) for group in groups]
    if split is not None:
        places = [Place(split, known.class_name) if known else None for known in places]
    return places


def _split_kind(folder: str) -> str | None:
    lower = folder.lower()
    return "train" if lower in TRAIN_FOLDERS else "val" if lower in HELD_OUT_FOLDERS else None
