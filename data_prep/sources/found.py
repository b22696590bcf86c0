"""What every kind of source shares: the images it finds, and how a worker reads one of them later.

A source is scanned once, in its own order; every image gets a place (container, offset, size) from
which any worker can read it without reading the others. What a worker needs for that is plain data
(`Source.reader`), which travels in the plan.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib",
                            ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
                            ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".heic",
                            ".heif", ".hif"})
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
TRAIN_NAMES = ("train", "training")
# The first that exists is the val split.
HELD_OUT_NAMES = ("val", "valid", "validation", "dev", "eval", "test", "testing", "holdout")
LABEL_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".jsonl", ".mat"})
# Made by machines beside what people put there; hidden folders are left out as well.
MACHINE_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "#recycle",
                             "System Volume Information", "__pycache__"})
Side = Mapping[str, Callable[[int], bytes]]  # files that may hold labels -> at most so many bytes
Group = str | tuple[str, str]  # a folder's name, or (split, class) where both are known


class SourceError(ValueError):
    """A source that cannot be read as what it claims to be; the message names it."""


class Found(NamedTuple):
    """One image of a source."""

    group: Group
    name: str  # unique in the source; what messages and rejected.jsonl call it
    container: int  # index into the reader's containers
    offset: int
    size: int  # bytes; -1 where only reading tells


class Located(Protocol):
    """Where a file or a folder lies: a `Path`, or a `Remote` behind a URL."""

    @property
    def name(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def parent(self) -> Located: ...
    def resolve(self) -> Located: ...
    def stat(self) -> Any: ...


class Source:
    """Base of every kind of source; `scan` fills what stands below."""

    kind: str
    pixels = False  # it gives RGB arrays, not files
    classes: tuple[str, ...] | None = None  # fixed order of labels; None: the names, ordered
    default_val_fraction: float | None = None

    def __init__(self, paths: Sequence[Located] = (), **reader: Any) -> None:
        """`reader`: what `open_reader` needs, as plain data."""
        self.paths = list(paths)
        self.reader = {"containers": [str(path.resolve()) for path in paths], **reader}
        # Files that are no images by their names: how many, by `suffix_of`.
        self.ignored: Counter[str] = Counter()
        self.links: list[str] = []  # images of an archive that are only links to others
        self.side: dict[str, Callable[[int], bytes]] = {}

    def scan(self) -> Iterator[Found]:
        """Raises: SourceError where the source is damaged."""
        raise NotImplementedError

    def pass_over(self, name: str, kind: str = "file") -> None:
        """Count what is no image."""
        if kind != "directory":
            self.ignored[suffix_of(name)] += 1

    def empty_groups(self) -> list[str]:
        """Folders without images, which may be classes."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self.paths)


class Reader(Protocol):
    """Reads images of a scanned source; one a process."""

    def read(self, name: str, container: int, offset: int, size: int) -> bytes | np.ndarray:
        """The encoded file, or uint8 RGB [height, width, 3]. Raises: Unreadable."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A reader whose next images do not lie one after another, where the kernel would see it."""

    def soon(self, name: str, container: int) -> None:
        """Let the disk begin with an image that will be read soon. Never waits for it, or fails."""
        ...


class Unreadable(ValueError):
    """One image cannot be had; the message is its reason in rejected.jsonl."""


def is_image_name(name: str) -> bool:
    """By its ending; hidden files and what lies in folders that machines make are none."""
    leaf = name.rpartition("/")[2]
    return (bool(name) and not leaf.startswith(".") and not machine_made(name)
            and os.path.splitext(leaf)[1].lower() in IMAGE_SUFFIXES)


def printable(name: str) -> str:
    """A file's name as text that any program reads: bytes that are no UTF-8 as `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def machine_made(path: str) -> bool:
    """Whether a file lies in a folder that no person made."""
    return any(map(is_machine_folder, path.split("/")[:-1]))


def number_classes(labels: Iterable[str]) -> tuple[str, ...] | None:
    """0 to the largest, where all labels are numbers; None otherwise.

    Raises: SourceError where they are too far apart to count classes.
    """
    found = set(labels)
    if not found or not all(label.isdecimal() and label.isascii() for label in found):
        return None
    largest = max(map(int, found))
    if largest > 1_000_000 and largest > 4 * len(found):
        raise SourceError(f"labels go up to {largest}, and there are {len(found)} of them: they do "
                          "not count classes; give names instead")
    return tuple(map(str, range(largest + 1)))


def suffix_of(name: str) -> str:
    """The ending by which a file that is skipped is counted."""
    return os.path.splitext(name)[1].lower() or "no suffix"


def refuse_size(size: int, limit: int) -> None:
    """Raises: Unreadable."""
    if size > limit:
        raise Unreadable(f"has {size} bytes, more than max_image_bytes = {limit}")


def file_fingerprint(paths: Sequence[Located]) -> dict[str, Any]:
    """Names, sizes and times: a source that was replaced while a conversion was interrupted is
    noticed without reading it all."""
    return {"files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
                      for path in paths]}


def split_names(found: Iterable[str]) -> dict[str, str]:
    """Canonical names of splits as a source calls them: train; val for the first held-out one."""
    lower = {name.lower() for name in found}
    names = {name: "train" for name in TRAIN_NAMES if name in lower}
    held_out = [name for name in HELD_OUT_NAMES if name in lower]
    return names | {name: "val" if name == held_out[0] else name for name in held_out}


def split_words(name: str, exact: bool = False) -> set[str]:
    """The words for splits in a folder's name; `exact`: it is nothing but one of them."""
    low = name.lower()
    words = {low} if exact else set(re.findall("[a-z]+", low))
    return words & {*TRAIN_NAMES, *HELD_OUT_NAMES}


def is_machine_folder(name: str) -> bool:
    return name.startswith(".") or name in MACHINE_FOLDERS


def split_in_name(path: Located) -> str | None:
    """The split that a file's name or its folder's begins with, e.g. train-00001-of-00294.parquet,
    imagenet-val-000003.tar; None where neither says."""
    for part in (path.name.lower(), path.parent.name.lower()):
        words = part.replace(".", "-").replace("_", "-").split("-")
        for word in words:
            if word in TRAIN_NAMES or word in HELD_OUT_NAMES:
                return word
    return None
