"""What every kind of source shares: the images it finds, and how a worker reads one of them later.

A source is scanned once, in its own order; every image gets a place (container, offset, size) from
which any worker can read it without reading the others. What a worker needs for that is plain data
(`Source.reader`), which travels in the plan.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib",
                            ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
                            ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".heic",
                            ".heif", ".hif"})
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test")  # the first that exists is the val split
Group = str | tuple[str, str]  # a folder's name, or (split, class) where both are known


class Found(NamedTuple):
    """One image of a source."""

    group: Group
    name: str  # unique in the source; what messages and rejected.jsonl call it
    container: int  # index into the reader's containers
    offset: int
    size: int  # bytes; -1 where only reading tells


class Source(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def pixels(self) -> bool:
        """It gives RGB arrays, not files."""
        ...
    @property
    def classes(self) -> tuple[str, ...] | None:
        """Fixed order of labels, known after the scan; None: sorted names."""
        ...
    @property
    def default_val_fraction(self) -> float | None: ...
    @property
    def ignored(self) -> Counter[str]:
        """Files seen by the scan that are no images by their names: how many, by `suffix_of`."""
        ...
    @property
    def reader(self) -> dict[str, Any]:
        """What `open_reader` needs, as plain data."""
        ...

    def scan(self) -> Iterator[Found]:
        """Raises: SourceError where the source is damaged."""
        ...

    def empty_groups(self) -> list[str]:
        """Folders without images: a class keeps its label though it has none."""
        ...

    def fingerprint(self) -> dict[str, Any]: ...


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
    """By its ending; hidden files and macOS' doubles are none."""
    folder, _, leaf = name.rpartition("/")
    return (bool(name) and not leaf.startswith(".") and not folder.startswith("__MACOSX")
            and os.path.splitext(leaf)[1].lower() in IMAGE_SUFFIXES)


def suffix_of(name: str) -> str:
    """The ending by which a file that is skipped is counted."""
    return os.path.splitext(name)[1].lower() or "no suffix"


def refuse_size(size: int, limit: int) -> None:
    """Raises: Unreadable."""
    if size > limit:
        raise Unreadable(f"has {size} bytes, more than max_image_bytes = {limit}")


def file_fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
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


def split_in_name(path: Path) -> str | None:
    """The split that a file's name or its folder's begins with, e.g. train-00001-of-00294.parquet,
    imagenet-val-000003.tar; None where neither says."""
    for part in (path.name.lower(), path.parent.name.lower()):
        words = part.replace(".", "-").replace("_", "-").split("-")
        for word in words:
            if word in TRAIN_NAMES or word in HELD_OUT_NAMES:
                return word
    return None
