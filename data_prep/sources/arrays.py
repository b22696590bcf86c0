"""Sources that hold pixels, not files: scikit-learn's digits, and CIFAR-10 and CIFAR-100 in the
python and binary archives of their authors."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources import tars
from data_prep.sources.found import Found, Source, SourceError, file_fingerprint, suffix_of

DIGIT_SIDE = 32


class Digits(Source):
    """1,797 handwritten digits that scikit-learn carries: 8 x 8 pixels, 17 levels.

    Each pixel becomes 4 x 4 equal ones and the level n becomes round(n * 255 / 16), so that a
    network made for CIFAR's 32 x 32 takes them and nothing is invented by interpolation.
    Source: Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).
    """

    kind = "digits"
    pixels = True
    classes = tuple(str(digit) for digit in range(10))
    default_val_fraction = 0.2

    def __init__(self) -> None:
        super().__init__(reader="digits")

    def scan(self) -> Iterator[Found]:
        from sklearn.datasets import load_digits

        for index, label in enumerate(load_digits().target):
            yield Found(("train", str(label)), f"digit-{index:04d}", 0, index, -1)

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


# --- CIFAR ---------------------------------------------------------------------------------------

CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE * CIFAR_SIDE
MAX_MEMBER_BYTES = 1 << 28  # CIFAR-100's training pickle has 155 MB
# File name: (split, bytes before the pixels of a record; 0: a pickle).
CIFAR_FILES = ({f"data_batch_{n}.bin": ("train", 1) for n in range(1, 6)}
               | {f"data_batch_{n}": ("train", 0) for n in range(1, 6)}
               | {"test_batch.bin": ("val", 1), "test_batch": ("val", 0),
                  "train.bin": ("train", 2), "test.bin": ("val", 2),
                  "train": ("train", 0), "test": ("val", 0)})
CIFAR_NAMES = ("batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt")


class Cifar(Source):
    """An archive as published, or the directory in it. CIFAR-100 gets its 100 fine labels.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images; the layout is
    on the page that distributes it: red, green and blue planes, rows from the top.
    """

    kind = "cifar"
    pixels = True

    def __init__(self, path: Path) -> None:
        # Filled by the scan: [file, offset, size, bytes before pixels] of every batch.
        super().__init__(reader="cifar", batches=[])
        self.path = path

    @staticmethod
    def members_in(names: Iterable[str]) -> bool:
        """Do these names make a CIFAR directory?"""
        found = set(names)
        return bool(found & set(CIFAR_NAMES)) and bool(found & set(CIFAR_FILES))

    def scan(self) -> Iterator[Found]:
        batches, names_text = self._members()
        if not batches or names_text is None:
            raise SourceError(f"{self.path}: lacks CIFAR's batches or its class names")
        self.classes = _class_names(names_text, self.path)
        self.reader["batches"] = [batch[1:] for batch in batches]
        for container, (name, file, offset, size, prefix) in enumerate(batches):
            labels = _read_batch(file, offset, size, prefix)[1]
            if len(labels) and max(labels) >= len(self.classes):
                raise SourceError(f"{self.path}: {name} has a label beyond the class names")
            split = CIFAR_FILES[name][0]
            for row, label in enumerate(labels):
                yield Found((split, self.classes[label]), f"{name}:{row}", container, row, -1)

    def _members(self) -> tuple[list[tuple[str, str, int, int, int]], tuple[str, bytes] | None]:
        """(name, file, offset, size, bytes before pixels) of the batches, training ones first; and
        the file of class names."""
        batches, names = [], {}
        for name, file, offset, size in self._files():
            if size > MAX_MEMBER_BYTES:
                raise SourceError(f"{self.path}: {name} claims {size} bytes, too many for CIFAR")
            if name in CIFAR_FILES:
                batches.append((name, file, offset, size, CIFAR_FILES[name][1]))
            elif name in CIFAR_NAMES:
                names[name] = _bytes_of(file, offset, size)
            else:
                self.ignored[suffix_of(name)] += 1
        order = {name: index for index, name in enumerate(CIFAR_FILES)}
        batches.sort(key=lambda batch: order[batch[0]])
        chosen = next(((name, names[name]) for name in CIFAR_NAMES if name in names), None)
        return batches, chosen

    def _files(self) -> Iterator[tuple[str, str, int, int]]:
        if self.path.is_dir():
            for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name):
                if entry.is_file():
                    yield entry.name, str(Path(entry.path).resolve()), 0, entry.stat().st_size
            return
        with closing(tars.open_bytes(self.path)) as data:
            for member in tars.members(data):
                if member.kind == "file":
                    yield (member.name.rpartition("/")[2], str(self.path.resolve()),
                           member.offset, member.size)

    def fingerprint(self) -> dict[str, Any]:
        inside = [self.path] if self.path.is_file() else sorted(
            entry for entry in self.path.iterdir() if entry.is_file())
        return file_fingerprint(inside)


def _bytes_of(file: str, offset: int, size: int) -> bytes:
    """Of a member of an archive; at 0, which no member begins at, of a file."""
    path = Path(file)
    with closing(tars.PlainFile(path) if offset == 0 else tars.open_bytes(path)) as data:
        return data.read_at(offset, size)


def _class_names(named: tuple[str, bytes], path: Path) -> tuple[str, ...]:
    name, data = named
    if name.endswith(".txt"):
        return tuple(data.decode().split())
    tree = _safe_unpickle(data, path)
    names = tree.get(b"label_names", tree.get(b"fine_label_names"))
    if not isinstance(names, list) or not names:
        raise SourceError(f"{path}: {name} holds no class names")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _read_batch(file: str, offset: int, size: int, prefix: int) -> tuple[np.ndarray, list[int]]:
    """(uint8 [n, 3072] colour planes, labels) of one batch file."""
    path, raw = Path(file), _bytes_of(file, offset, size)
    if prefix:
        if len(raw) != size or size % (prefix + CIFAR_PIXELS):
            raise SourceError(f"{file}: a batch of {len(raw)} bytes is not whole records")
        records = np.frombuffer(raw, np.uint8).reshape(-1, prefix + CIFAR_PIXELS)
        return records[:, prefix:], [int(label) for label in records[:, prefix - 1]]
    tree = _safe_unpickle(raw, path)
    pixels = tree.get(b"data")
    labels = tree.get(b"labels", tree.get(b"fine_labels"))
    if (not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2
            or pixels.shape[1] != CIFAR_PIXELS or not isinstance(labels, list)
            or len(labels) != len(pixels)
            or not all(isinstance(label, int) and label >= 0 for label in labels)):
        raise SourceError(f"{file}: a batch is not CIFAR's data and labels")
    return pixels, labels


class _OnlyArrays(pickle.Unpickler):
    """Builds lists, dicts, strings and NumPy arrays, calls nothing else: the archives are pickles,
    and a pickle from a stranger may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name)
        if known in (("numpy.core.multiarray", "_reconstruct"),
                     ("numpy._core.multiarray", "_reconstruct")):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if known in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if known == ("_codecs", "encode"):
            return lambda text, encoding="latin1": text.encode("latin1")
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _safe_unpickle(data: bytes, path: Path) -> dict[bytes, Any]:
    try:
        tree = _OnlyArrays(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises anything
        raise SourceError(f"{path}: a pickle in it cannot be read safely ({error})") from None
    if not isinstance(tree, dict):
        raise SourceError(f"{path}: a pickle in it is not a dictionary")
    return {key.encode() if isinstance(key, str) else key: value for key, value in tree.items()}


class CifarReader:
    """Keeps one batch file in memory; images of one follow each other."""

    def __init__(self, reader: dict[str, Any]) -> None:
        self._batches = reader["batches"]
        self._held = -1
        self._pixels = np.zeros((0, CIFAR_PIXELS), np.uint8)

    def read(self, name: str, container: int, offset: int, size: int) -> np.ndarray:
        if container != self._held:
            self._pixels = _read_batch(*self._batches[container])[0]
            self._held = container
        planes = self._pixels[offset].reshape(3, CIFAR_SIDE, CIFAR_SIDE)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))
