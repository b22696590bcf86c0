"""Sources made of archives: class folders, ILSVRC2012 as it was published, WebDataset shards.

All are walked once and then read at offsets, plain archives by any number of workers; compressed
ones are decompressed by every worker up to where it reads, so a plain tar is the faster source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.sources import tars, zips
from data_prep.sources.found import (
    LABEL_SUFFIXES,
    Found,
    Located,
    Source,
    SourceError,
    is_image_name,
    machine_made,
    number_classes,
    refuse_size,
    split_in_name,
    split_names,
    suffix_of,
)
from data_prep.sources.remote import located

LOOK_FILES = 64  # members from which the kind of an archive is told
MAX_LABEL_BYTES = 1 << 16
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
CIFAR_NAMES = frozenset({"data_batch_1", "data_batch_1.bin", "train.bin", "fine_label_names.txt",
                         "batches.meta", "batches.meta.txt"})


def look_into(path: Located) -> str:
    """"ilsvrc-train" (a tar of tars), "ilsvrc-val", "cifar", "webdataset", "flat" (images outside
    folders) or "folders", from the first members. Raises: SourceError."""
    files = (member.name for _, member in zips.walk(path)
             if member.kind == "file" and member.name)
    names = list(islice(files, LOOK_FILES))
    leaves = [name.rpartition("/")[2] for name in names]
    if any(leaf in CIFAR_NAMES for leaf in leaves) or {"train", "test", "meta"} <= set(leaves):
        return "cifar"
    if leaves and all(leaf.endswith(".tar") for leaf in leaves):
        return "ilsvrc-train"
    if leaves and all(VAL_NAME.fullmatch(leaf) for leaf in leaves):
        return "ilsvrc-val"
    if any(leaf.endswith((".cls", ".cls.txt")) for leaf in leaves) or _pairs(names):
        return "webdataset"
    return "flat" if names and all("/" not in name for name in names) else "folders"


def _pairs(names: list[str]) -> bool:
    """Images that each have a .json of the same name beside them."""
    stems = {name.rpartition(".")[0] for name in names if name.endswith(".json")}
    return bool(stems) and any(name.rpartition(".")[0] in stems for name in names
                               if is_image_name(name))


class TarFolders(Source):
    """Archives of folders. The images that lie in no folder of one of several tars are in one named
    after it: of a class (n01440764.tar), or of a split (val_images.tar.gz)."""

    def __init__(self, paths: Sequence[Located]) -> None:
        super().__init__(paths, reader="spans")
        self.kind = "zip" if zips.is_zip_name(paths[0].name) else "tar"
        self._folders: set[str] = set()
        self._seen: set[str] = set()

    def scan(self) -> Iterator[Found]:
        for container, path in enumerate(self.paths):
            stem = path.name.partition(".")[0] if len(self.paths) > 1 else ""
            for _, member in zips.walk(path):
                name = member.name
                if stem and name and "/" not in name and member.kind == "file":
                    name = f"{stem}/{name}"
                folder = name.rpartition("/")[0]
                if member.kind == "directory":
                    if name not in ("", ".") and not machine_made(f"{name}/"):
                        self._folders.add(name)
                elif member.kind == "file" and is_image_name(name):
                    self._seen.add(folder)
                    yield Found(folder, name, container, member.offset, member.size)
                else:
                    if member.kind == "link" and is_image_name(name):
                        self.links.append(name)
                    self.ignored["link" if member.kind == "link" else suffix_of(name)] += 1
                    if member.kind == "file" and Path(name).suffix.lower() in LABEL_SUFFIXES:
                        self.side[name] = partial(_text_of, path, member)

    def empty_groups(self) -> list[str]:
        return sorted(self._folders - self._seen)


def _text_of(path: Located, member: tars.Member, limit: int) -> bytes:
    data = tars.open_bytes(path)
    try:
        if zips.is_zip_name(path.name):
            return zips.read(data, member.offset, member.size, limit)
        return data.read_at(member.offset, min(member.size, limit))
    finally:
        data.close()


class Ilsvrc(Source):
    """ILSVRC2012 as published: a tar of one tar a class to train on; a flat tar to validate on,
    whose labels are in the development kit that lies beside it.

    Source: the kit's readme.txt, sections 2.2 (meta.mat) and 2.3 (validation ground truth).
    """

    kind = "ilsvrc2012"

    def __init__(self, paths: Sequence[Located]) -> None:
        super().__init__(paths, reader="spans")

    def scan(self) -> Iterator[Found]:
        for container, path in enumerate(self.paths):
            if look_into(path) == "ilsvrc-train":
                yield from self._scan_train(container, path)
            else:
                yield from self._scan_val(container, path)

    def _scan_train(self, container: int, path: Located) -> Iterator[Found]:
        for data, outer in zips.walk(path):
            if outer.kind != "file" or not outer.name.endswith(".tar"):
                self.pass_over(outer.name, outer.kind)
                continue
            wnid = outer.name.rpartition("/")[2].removesuffix(".tar")
            for member in tars.members(data, outer.offset, outer.offset + outer.size):
                if member.kind == "file" and is_image_name(member.name):
                    yield Found(("train", wnid), f"{outer.name}/{member.name}", container,
                                member.offset, member.size)
                else:
                    self.pass_over(member.name, member.kind)

    def _scan_val(self, container: int, path: Located) -> Iterator[Found]:
        if not isinstance(path, Path):
            raise SourceError(f"{path}: its labels are in the development kit; copy both to this "
                              "machine")
        labels = validation_labels(path.parent)
        for _, member in zips.walk(path):
            match = VAL_NAME.fullmatch(member.name.rpartition("/")[2])
            if member.kind != "file" or not match:
                self.pass_over(member.name, member.kind)
                continue
            number = int(match[1])
            if not 1 <= number <= len(labels):
                raise SourceError(f"{path}: {member.name} has no label; the development kit "
                                  f"has {len(labels)}")
            yield Found(("val", labels[number - 1]), member.name, container, member.offset,
                        member.size)


def validation_labels(folder: Path) -> list[str]:
    """wnid of every validation image, in order, from the development kit in `folder`: its archive
    or its extracted directory. Raises: SourceError."""
    archives = sorted(folder.glob("ILSVRC2012_devkit*.tar*"))
    extracted = sorted(folder.glob("ILSVRC2012_devkit*/data"))
    if archives:
        meta, truth = _kit_files(archives[0])
    elif extracted:
        try:
            meta = (extracted[0] / "meta.mat").read_bytes()
            truth = (extracted[0] / "ILSVRC2012_validation_ground_truth.txt").read_bytes()
        except OSError as error:
            raise SourceError(f"{extracted[0]}: {error}") from None
    else:
        raise SourceError(f"SOURCE = {folder}: the validation archive needs its labels; put "
                          "ILSVRC2012_devkit_t12.tar.gz beside it")
    where = archives[0] if archives else extracted[0]
    wnids = _wnids(meta, where)
    try:
        return [wnids[int(line)] for line in truth.split()]
    except (KeyError, ValueError) as error:
        raise SourceError(f"{where}: the ground truth has an unknown class {error}") from None


def _kit_files(archive: Path) -> tuple[bytes, bytes]:
    files: dict[str, bytes] = {}
    for data, member in zips.walk(archive):
        leaf = member.name.rpartition("/")[2]
        if leaf in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt") and (
                member.kind == "file" and member.size < 1 << 26):
            files[leaf] = data.read_at(member.offset, member.size)
    if len(files) != 2:
        raise SourceError(f"{archive}: lacks meta.mat or ILSVRC2012_validation_ground_truth.txt")
    return files["meta.mat"], files["ILSVRC2012_validation_ground_truth.txt"]


def _wnids(meta: bytes, where: Path) -> dict[int, str]:
    """wnid by ILSVRC2012_ID."""
    import io

    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets.flat}
    except Exception as error:  # loadmat raises anything on a damaged file
        raise SourceError(f"{where}: meta.mat cannot be read ({error})") from None


class WebDataset(Source):
    """Tars of samples: members that share a key, KEY.jpg with KEY.cls or KEY.json {"label": ...}.

    Source: the WebDataset format (webdataset/webdataset): the key ends at the first dot of the
    file's name. Labels are numbers, in their own order, or names, sorted.
    """

    kind = "webdataset"

    def __init__(self, paths: Sequence[Located]) -> None:
        super().__init__(paths, reader="spans")
        self.image: str | None = None  # ending of the one that is meant, where a key has several

    def scan(self) -> Iterator[Found]:
        splits = {path: split_in_name(path) for path in self.paths}
        names = split_names(split for split in splits.values() if split)
        seen: set[str] = set()
        for container, path in enumerate(self.paths):
            split = names.get(splits[path] or "", "train")
            for label, found in self._samples(container, path):
                if label is not None:
                    seen.add(label)
                    found = found._replace(group=(split, label))
                yield found
        self.classes = number_classes(seen)

    def _samples(self, container: int, path: Located) -> Iterator[tuple[str | None, Found]]:
        key: str | None = None
        images: list[Found] = []
        label: str | None = None
        for data, member in zips.walk(path):
            if member.kind != "file" or not member.name:
                if member.kind not in ("file", "directory"):
                    self.ignored[suffix_of(member.name)] += 1
                continue
            folder, _, leaf = member.name.rpartition("/")
            stem, _, ending = leaf.partition(".")
            this = f"{folder}/{stem}"
            if this != key:
                yield from _one(label, images, path)
                key, images, label = this, [], None
            if is_image_name(member.name) and self.image in (None, ending):
                name = f"{path.name}/{member.name}"
                images.append(Found("", name, container, member.offset, member.size))
            elif ending in ("cls", "cls.txt", "json") and member.size <= MAX_LABEL_BYTES:
                found = _label(data.read_at(member.offset, member.size), ending)
                label = label if found is None else found
            else:
                self.ignored[suffix_of(member.name)] += 1
        yield from _one(label, images, path)


def _one(label: str | None, images: list[Found], path: Located
         ) -> Iterator[tuple[str | None, Found]]:
    """The image of a sample. Raises: SourceError where there are several."""
    if len(images) > 1:
        raise SourceError(f"{path}: a sample has {len(images)} images, "
                          f"{' and '.join(image.name.rpartition('/')[2] for image in images)}, and "
                          "which is to be learnt from is not said (a key ends at the first dot); "
                          f"say image={images[0].name.rpartition('/')[2].partition('.')[2]}")
    yield from ((label, image) for image in images)


def _label(text: bytes, ending: str) -> str | None:
    value: object = text.decode("utf-8", "replace").strip()
    if ending == "json":
        try:
            tree = json.loads(text)
        except ValueError:
            return None
        if not isinstance(tree, dict):
            return None
        value = next((tree[key] for key in ("label", "cls", "class", "class_id", "target")
                      if isinstance(tree.get(key), int | str)), None)
    return None if value is None or value == "" else str(value)


class SpanReader:
    """Images that lie as bytes inside plain or compressed files."""

    def __init__(self, reader: dict[str, Any], max_bytes: int) -> None:
        self._paths = [located(path) for path in reader["containers"]]
        self._open: dict[int, tars.Bytes] = {}
        self._max_bytes = max_bytes

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        refuse_size(size, self._max_bytes)
        if container not in self._open:
            while len(self._open) >= 16:
                self._open.pop(next(iter(self._open))).close()
            self._open[container] = tars.open_bytes(self._paths[container])
        if zips.is_zip_name(self._paths[container].name):
            return zips.read(self._open[container], offset, size, self._max_bytes)
        data = self._open[container].read_at(offset, size)
        if len(data) < size:
            raise SourceError(f"{self._paths[container]}: is shorter than when it was scanned")
        return data
