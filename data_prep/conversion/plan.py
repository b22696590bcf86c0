"""The plan of a conversion: every image's place and label, on disk, before the first shard.

In: a scanned source. Out: `DST/.convert/` with
    plan.json          what was asked, the source's fingerprint, classes, shards; written last
    rows.npy           one ROW an image, in the order of splits and shards; read as a memory map
    names.bin          the images' names, one after another
    records/           one JSON a finished shard: its hash, counts, pixel sums, rejected images
Workers on any machine read it; a second run finds what is done. Memory stays at a few dozen bytes
an image while scanning, and at one shard's rows after that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from data_prep.encode import formats
from data_prep.shards.beton import write_atomically
from data_prep.sources.folders import Place, place_groups
from data_prep.sources.found import HEIF_SUFFIXES, Group, Source
from data_prep.sources.tars import SourceError
from resnet_dist.run.paths import DatasetPaths

PLAN_VERSION = 3  # also of the records
ROW = np.dtype([("group", "<i4"), ("container", "<i4"), ("offset", "<i8"), ("size", "<i8"),
                ("name_at", "<i8"), ("name_len", "<i4"), ("label", "<i4")])
SHARD_BYTES = 150_000_000  # large enough to stream, small enough to redo and to hold in memory
MIN_SHARDS = 4  # so that small sets are worked on in parallel, too
FEW = 64  # images below which one shard is enough


@dataclass(frozen=True)
class PlannedSplit:
    name: str
    start: int  # first row
    samples: int
    shards: int

    def rows(self, index: int) -> tuple[int, int]:
        """[first, last) row of a shard: equal parts, so that no shard is a small rest."""
        return (self.start + self.samples * index // self.shards,
                self.start + self.samples * (index + 1) // self.shards)


@dataclass(frozen=True)
class ShardId:
    split: str
    index: int

    def __str__(self) -> str:
        return f"{self.split}/shard-{self.index:05d}.beton"


@dataclass(frozen=True)
class WorkPaths:
    """Files of an unfinished conversion; removed once the manifest is on disk."""

    root: Path

    @classmethod
    def of(cls, dst: Path) -> WorkPaths:
        return cls(dst / ".convert")

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def rows(self) -> Path:
        return self.root / "rows.npy"

    @property
    def names(self) -> Path:
        return self.root / "names.bin"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    def record(self, shard: ShardId) -> Path:
        return self.root / "records" / f"{shard.split}-{shard.index:05d}.json"

    def pixel_sums(self, shard: ShardId) -> Path:
        return self.root / "records" / f"{shard.split}-{shard.index:05d}.npy"


@dataclass(frozen=True)
class Plan:
    key: str  # SHA-256 of everything that decides the shards' bytes
    dst: Path
    kind: str
    reader: dict[str, Any]
    pixels: bool
    options: dict[str, Any]  # the ConvertConfig as plain data
    identity: dict[str, Any]  # what the shards' bytes depend on besides the listing
    listing: str  # SHA-256 of names, places and labels: the same wherever the source lies
    source_name: str
    append: bool  # to the data set that `dst` holds already
    classes: tuple[str, ...]
    splits: tuple[PlannedSplit, ...]
    ignored: dict[str, int]  # files that are no images, by suffix

    @property
    def work(self) -> WorkPaths:
        return WorkPaths.of(self.dst)

    def shards(self) -> list[ShardId]:
        return [ShardId(split.name, index) for split in self.splits
                for index in range(split.shards)]

    def split(self, name: str) -> PlannedSplit:
        return next(split for split in self.splits if split.name == name)

    def shard_path(self, shard: ShardId) -> Path:
        return DatasetPaths(self.dst).shard(shard.split, shard.index)

    def shard_rows(self, shard: ShardId) -> tuple[np.ndarray, list[str]]:
        """Rows (ROW [n]) and names of one shard, read from disk."""
        first, last = self.split(shard.split).rows(shard.index)
        rows = np.load(self.work.rows, mmap_mode="r")[first:last].copy()
        names = []
        with open(self.work.names, "rb") as file:
            for at, length in zip(rows["name_at"], rows["name_len"], strict=True):
                file.seek(int(at))
                names.append(file.read(int(length)).decode("utf-8", "surrogateescape"))
        return rows, names


def plan_key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def make_plan(source: Source, dst: Path, options: dict[str, Any], identity: dict[str, Any], *,
              split: str | None, val_fraction: float | None, shard_samples: int | None,
              outside: str, known_classes: tuple[str, ...] | None, bytes_an_image: float | None,
              name: str, heif_allowed: int, taken_splits: tuple[str, ...] = ()) -> Plan:
    """Scan the source and write the plan. `identity` is what the shards' bytes depend on.

    Args:
        heif_allowed: HEIC images that may be rejected where nothing here reads them.

    Raises: SourceError where the source is damaged, empty, or holds images of no class.
    """
    work = WorkPaths.of(dst)
    if work.root.exists():
        shutil.rmtree(work.root)
    (work.root / "records").mkdir(parents=True)
    rows, groups, heif = _scan(source, work)
    if heif > heif_allowed and not formats.reads_heif():
        raise SourceError(f"SOURCE = {name}: {heif} of its images are HEIC, which needs a library: "
                          f"`pip install pillow-heif`; or leave them out with max_rejected={heif}")
    if not len(rows):
        raise SourceError(f"SOURCE = {name}: no images found in it")
    above = {str(parent) for folder in [*groups, *source.empty_groups()]
             if isinstance(folder, str) for parent in PurePosixPath(folder).parents}
    empty = [folder for folder in source.empty_groups() if folder not in above]
    places = place_groups([*groups, *empty], split, name)
    _refuse_outside(places[:len(groups)], groups, rows, outside, name)
    class_names = _class_names(source, known_classes, places, name)
    unknown = {place.class_name for place in places if place} - set(class_names)
    if unknown:
        raise SourceError(f"SOURCE = {name}: class {min(unknown)!r} is not among the "
                          f"{len(class_names)} known ones")
    labels = {name: label for label, name in enumerate(class_names)}
    row_labels = np.array([labels[place.class_name] if place else -1
                           for place in places[:len(groups)]], np.int32)[rows["group"]]
    split_names = sorted({place.split for place in places[:len(groups)] if place},
                         key=lambda split: (split != "train", split))
    row_splits = np.array([split_names.index(place.split) if place else -1
                           for place in places[:len(groups)]], np.int32)[rows["group"]]
    fraction = val_fraction if val_fraction is not None else source.default_val_fraction
    if fraction and split_names == ["train"]:
        held_out = _held_out(rows, row_labels, work, fraction)
        row_splits[held_out] = 1
        split_names = ["train", "val"]
    elif val_fraction is not None:
        raise SourceError(f"val_fraction = {val_fraction}: the source has its own splits "
                          f"{', '.join(split_names)}; drop the option")
    taken = sorted(set(taken_splits) & set(split_names))
    if taken:
        raise SourceError(f"SOURCE = {name}: its split {taken[0]!r} is in the data set already; "
                          "name the new one with split=NAME")
    rows["label"] = row_labels
    order = np.argsort(row_splits, kind="stable")
    order = order[np.count_nonzero(row_splits < 0):]
    ordered = rows[order]
    planned, start = [], 0
    for index, split_name in enumerate(split_names):
        count = int(np.count_nonzero(row_splits == index))
        sizes = ordered["size"][start:start + count]
        mean = bytes_an_image or float(np.maximum(sizes, 0).mean()) or None
        planned.append(PlannedSplit(split_name, start, count,
                                    _shard_count(count, shard_samples, mean)))
        start += count
    with open(work.rows, "wb") as file:
        np.save(file, ordered)
    (work.root / "rows.bin").unlink()
    listing = _listing(work, ordered)
    key = plan_key(identity | {"classes": class_names, "listing": listing,
                               "splits": [asdict(split) for split in planned]})
    plan = Plan(key=key, dst=dst, kind=source.kind, reader=source.reader, pixels=source.pixels,
                options=options, identity=identity, listing=listing,
                source_name=Path(name).resolve().name,
                append=bool(taken_splits), classes=tuple(class_names), splits=tuple(planned),
                ignored=dict(sorted(source.ignored.items())))
    tree = asdict(plan) | {"dst": None, "version": PLAN_VERSION}
    write_atomically(work.plan, (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())
    return plan


def _listing(work: WorkPaths, rows: np.ndarray) -> str:
    """SHA-256 of all names, places and labels."""
    sha = hashlib.sha256(rows.tobytes())
    with open(work.names, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def load_plan(dst: Path) -> Plan | None:
    """The plan in `dst`, or None where there is none of this version."""
    try:
        tree = json.loads(WorkPaths.of(dst).plan.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if tree.pop("version", None) != PLAN_VERSION:
        return None
    tree |= {"dst": dst, "classes": tuple(tree["classes"]),
             "splits": tuple(PlannedSplit(**split) for split in tree["splits"])}
    return Plan(**tree)


def _scan(source: Source, work: WorkPaths) -> tuple[np.ndarray, list[Group], int]:
    """Rows in the source's order, on disk as they come, the groups they belong to, and how many
    are HEIC by their names."""
    groups: dict[Group, int] = {}
    block = np.zeros(4096, ROW)
    used = name_at = heif = 0
    with open(work.root / "rows.bin", "wb") as rows, open(work.names, "wb") as names:
        for found in source.scan():
            name = found.name.encode("utf-8", "surrogateescape")
            block[used] = (groups.setdefault(found.group, len(groups)), found.container,
                           found.offset, found.size, name_at, len(name), -1)
            heif += found.name[-5:].lower().endswith(HEIF_SUFFIXES)
            names.write(name)
            name_at += len(name)
            used += 1
            if used == len(block):
                rows.write(block.tobytes())
                used = 0
        rows.write(block[:used].tobytes())
    return np.fromfile(work.root / "rows.bin", ROW), list(groups), heif


def _class_names(source: Source, known: tuple[str, ...] | None, places: list[Place | None],
                 name: str) -> tuple[str, ...]:
    """Names in the order of labels: a given list, the source's own, or what was found, sorted.
    Where the source only has numbers, a given list names them."""
    own = source.classes
    if known is None:
        return own or tuple(sorted({place.class_name for place in places if place}))
    if own and all(label.isdigit() for label in own) and not all(n.isdigit() for n in known):
        if len(own) > len(known):
            raise SourceError(f"SOURCE = {name}: has labels up to {len(own) - 1}, and "
                              f"{len(known)} class names are given")
        for index, place in enumerate(places):
            if place:
                places[index] = Place(place.split, known[int(place.class_name)])
    elif own and own != known:
        raise SourceError(f"SOURCE = {name}: its {len(own)} classes differ from the "
                          f"{len(known)} given ones")
    return known


def _refuse_outside(places: list[Place | None], groups: list[Group],
                    rows: np.ndarray, outside: str, name: str) -> None:
    lost = [index for index, place in enumerate(places) if place is None]
    count = int(np.isin(rows["group"], lost).sum())
    if count == len(rows):
        raise SourceError(f"SOURCE = {name}: its {count} images lie in no class folders; arrange "
                          "them as CLASS/IMAGE or train/CLASS/IMAGE")
    if count and outside == "refuse":
        raise SourceError(f"SOURCE = {name}: {count} images lie outside class folders, the first "
                          f"in {groups[lost[0]] or '.'!r}; move them, or leave them out with "
                          "outside=ignore")


def _held_out(rows: np.ndarray, labels: np.ndarray, work: WorkPaths,
              fraction: float) -> np.ndarray:
    """Row indices of the val split: of every class the `fraction` whose names hash lowest, so that
    neither order nor machine matters. What a class is short of a whole image carries over to the
    next one, so small classes count too; a class of several images is never held out whole.

    Raises: SourceError where that leaves a split empty.
    """
    blob = work.names.read_bytes()
    hashes = np.array([xxhash.xxh3_64_intdigest(blob[at:at + length]) for at, length
                       in zip(rows["name_at"].tolist(), rows["name_len"].tolist(), strict=True)],
                      np.uint64)
    chosen, owed = [], 0.0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        owed += fraction * len(members)
        count = min(round(owed), max(len(members) - 1, 1))
        owed -= count
        chosen.append(members[np.argsort(hashes[members], kind="stable")[:count]])
    held_out = np.concatenate(chosen)
    if not 0 < len(held_out) < len(labels):
        raise SourceError(f"val_fraction = {fraction}: would hold out {len(held_out)} of "
                          f"{len(labels)} images; choose another fraction")
    return held_out


def _shard_count(samples: int, shard_samples: int | None, mean_bytes: float | None) -> int:
    if shard_samples is not None:
        return -(-samples // shard_samples)
    by_size = -(-int(samples * (mean_bytes or 110_000.0)) // SHARD_BYTES)
    if samples < FEW:
        return max(by_size, 1)
    return -(-by_size // MIN_SHARDS) * MIN_SHARDS  # an odd one would leave workers idle at the end
