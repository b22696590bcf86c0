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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.conversion.account import by_number
from data_prep.conversion.sense import judge
from data_prep.encode import formats
from data_prep.sources.classes import ClassList, order_classes
from data_prep.sources.found import HEIF_SUFFIXES, Group, Source, SourceError, printable
from data_prep.sources.readings import Place, Reading, Said, read_folders
from resnet_dist.run.atomic import write_atomically
from resnet_dist.run.paths import DatasetPaths

PLAN_VERSION = 4  # also of the records
ROW = np.dtype([("group", "<i4"), ("container", "<i4"), ("offset", "<i8"), ("size", "<i8"),
                ("name_at", "<i8"), ("name_len", "<i4"), ("label", "<i4")])
SHARD_BYTES = 150_000_000  # large enough to stream, small enough to redo and to hold in memory
NOTES = 5  # of one kind
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


class WorkPaths:
    """Files of an unfinished conversion into `dst`; removed once the manifest is on disk."""

    def __init__(self, dst: Path) -> None:
        self.root = dst / ".convert"
        self.plan, self.rows, self.names = (
            self.root / name for name in ("plan.json", "rows.npy", "names.bin"))

    def record(self, shard: ShardId) -> Path:
        return self.root / "records" / f"{shard.split}-{shard.index:05d}.json"

    def pixel_sums(self, shard: ShardId) -> Path:
        return self.record(shard).with_suffix(".npy")


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
    told: dict[str, Any]  # how the source was read: shape, why, left_out, warnings

    @property
    def work(self) -> WorkPaths:
        return WorkPaths(self.dst)

    def shards(self) -> list[ShardId]:
        return [ShardId(split.name, index) for split in self.splits
                for index in range(split.shards)]

    def split(self, name: str) -> PlannedSplit:
        return next(split for split in self.splits if split.name == name)

    def samples(self, shard: ShardId) -> int:
        first, last = self.split(shard.split).rows(shard.index)
        return last - first

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
              said: Said, known_classes: ClassList | None, bytes_an_image: float | None, name: str,
              heif_allowed: int, taken_splits: tuple[str, ...] = ()) -> Plan:
    """Scan the source and write the plan. `identity` is what the shards' bytes depend on.

    Args:
        heif_allowed: HEIC images that may be rejected where nothing here reads them.

    Raises: SourceError where the source is damaged, empty, has two readings, or makes no sense to
        learn from.
    """
    work = WorkPaths(dst)
    if work.root.exists():
        shutil.rmtree(work.root)
    (work.root / "records").mkdir(parents=True)
    rows, groups, heif = _scan(source, work)
    if heif > heif_allowed and not formats.reads_heif():
        raise SourceError(f"SOURCE = {name}: {heif} of its images are HEIC, which needs a library: "
                          f"`pip install pillow-heif`; or leave them out with max_rejected={heif}")
    if not len(rows):
        inside = f"; it holds {by_number(source.ignored)}" if source.ignored else ""
        raise SourceError(f"SOURCE = {name}: no images found in it{inside}")
    names = Names(work, rows)
    reading, row_places, places, empty = _places(source, rows, groups, names, said, name)
    kept = empty if "empty_classes" in options["accept"] else []
    classes, place_labels = order_classes(source.classes, known_classes, [*places, *kept],
                                          options["order"], name)
    _refuse_outside(rows, groups, row_places, reading, names, said.outside, name,
                    source.links)
    splits = sorted({place.split for place in places},
                    key=lambda split: (split != "train", split))
    outside = row_places < 0
    row_labels = np.where(outside, -1, np.array(place_labels, np.int32)[row_places])
    row_splits = np.where(outside, -1, np.array([splits.index(place.split) for place in places],
                                                np.int32)[row_places])
    val_fraction = options["val_fraction"]
    fraction = val_fraction if val_fraction is not None else source.default_val_fraction
    if fraction and splits == ["train"]:
        held_out = _held_out(rows, row_labels, work, fraction)
        row_splits[held_out] = 1
        splits = ["train", "val"]
    elif val_fraction is not None:
        raise SourceError(f"val_fraction = {val_fraction}: the source has its own splits "
                          f"{', '.join(splits)}; drop the option")
    taken = sorted(set(taken_splits) & set(splits))
    if taken:
        raise SourceError(f"SOURCE = {name}: its split {taken[0]!r} is in the data set already; "
                          "name the new one with split=NAME")
    counts = {split: np.bincount(row_labels[row_splits == index], minlength=len(classes))
              for index, split in enumerate(splits)}
    warnings = judge(counts, classes, empty, options["accept"], name, appended=bool(taken_splits),
                     named=bool(source.classes or known_classes or said.splits))
    warnings += reading.notes[:NOTES]
    if len(reading.notes) > NOTES:
        warnings.append(f"... and {len(reading.notes) - NOTES} more such folders")
    told = {"shape": reading.shape, "why": reading.why, "warnings": warnings,
            "left_out": _left_out(reading, rows, groups, row_places)}
    rows["label"] = row_labels
    order = np.argsort(row_splits, kind="stable")
    order = order[np.count_nonzero(row_splits < 0):]
    ordered = rows[order]
    planned, start = [], 0
    for index, split_name in enumerate(splits):
        count = int(np.count_nonzero(row_splits == index))
        sizes = ordered["size"][start:start + count]
        mean = bytes_an_image or float(np.maximum(sizes, 0).mean()) or None
        planned.append(PlannedSplit(split_name, start, count,
                                    _shard_count(count, options["shard_samples"], mean)))
        start += count
    with open(work.rows, "wb") as file:
        np.save(file, ordered)
    (work.root / "rows.bin").unlink()
    listing = _listing(work, ordered)
    key = plan_key(identity | {"classes": classes, "listing": listing,
                               "splits": [asdict(split) for split in planned]})
    plan = Plan(key=key, dst=dst, kind=source.kind, reader=source.reader, pixels=source.pixels,
                options=options, identity=identity, listing=listing,
                source_name=printable(Path(name).resolve().name), append=bool(taken_splits),
                classes=tuple(classes), splits=tuple(planned), told=told,
                ignored=dict(sorted(source.ignored.items())))
    tree = asdict(plan) | {"dst": None, "version": PLAN_VERSION}
    write_atomically(work.plan, json.dumps(tree, indent=1, sort_keys=True) + "\n")
    return plan


class Names:
    """The images' names, as the scan wrote them."""

    def __init__(self, work: WorkPaths, rows: np.ndarray) -> None:
        self._work, self._rows = work, rows
        self._blob: bytes | None = None

    def __getitem__(self, index: int) -> str:
        if self._blob is None:
            self._blob = self._work.names.read_bytes()
        at, length = int(self._rows["name_at"][index]), int(self._rows["name_len"][index])
        return self._blob[at:at + length].decode("utf-8", "surrogateescape")


def _places(source: Source, rows: np.ndarray, groups: list[Group], names: Names, said: Said,
            name: str) -> tuple[Reading, np.ndarray, list[Place], list[Place]]:
    """How the source was read; of every row the index of its place (-1: none); the places with
    images, and those of folders without."""
    counts = np.bincount(rows["group"], minlength=len(groups))
    folders = {group: int(count) for group, count in zip(groups, counts, strict=True)
               if isinstance(group, str)}
    members: dict[str, np.ndarray] = {}

    def leaves(folder: str) -> list[str]:
        if folder not in members:
            members[folder] = np.flatnonzero(rows["group"] == groups.index(folder))
        return [names[int(row)].rpartition("/")[2] for row in members[folder]]

    labelled = [group for group in groups if not isinstance(group, str)]
    if labelled:
        reading = Reading(source.kind, "splits and labels stand in it",
                          dict.fromkeys(folders))
    else:
        empty_folders = dict.fromkeys(source.empty_groups(), 0)
        reading = read_folders(folders | empty_folders, leaves, source.side, said, name)
    index: dict[Place, int] = {}
    of_group = np.full(len(groups), -1, np.int32)
    for number, group in enumerate(groups):
        known = reading.places.get(group) if isinstance(group, str) else Place(
            said.split or group[0], group[1])
        if isinstance(known, Place):
            of_group[number] = index.setdefault(known, len(index))
    row_places = of_group[rows["group"]]
    for number, group in enumerate(groups):
        tell = reading.places.get(group) if isinstance(group, str) else None
        if callable(tell):
            for row in np.flatnonzero(rows["group"] == number):
                place = tell(names[int(row)])
                row_places[row] = -1 if place is None else index.setdefault(place, len(index))
    empty = [place for folder, place in reading.places.items()
             if isinstance(place, Place) and folder not in folders]
    return reading, row_places, list(index), empty


def _refuse_outside(rows: np.ndarray, groups: list[Group], row_places: np.ndarray,
                    reading: Reading, names: Names, outside: str, name: str,
                    links: list[str]) -> None:
    """Raises: SourceError where images are of no class, and nobody has said to leave them out."""
    lost = np.flatnonzero(row_places < 0)
    if len(lost) == len(rows):
        raise SourceError(f"SOURCE = {name}: its {len(lost)} images lie in no class folders; "
                          "arrange them as CLASS/IMAGE or train/CLASS/IMAGE, or say where their "
                          "labels stand with labels=FILE or label_from=REGEX")
    if outside == "ignore":
        return
    if links:
        raise SourceError(f"SOURCE = {name}: {len(links)} of its images are links, the first "
                          f"{links[0]!r}; unpack it and convert the folder, or make the archive "
                          "anew with tar --dereference --hard-dereference; outside=ignore leaves "
                          "them out")
    strays = [int(row) for row in lost if groups[rows["group"][row]] not in reading.left_out]
    if strays:
        where = groups[rows["group"][strays[0]]]
        raise SourceError(f"SOURCE = {name}: {len(strays)} images lie outside class folders, the "
                          f"first in {where or '.'!r} ({names[strays[0]]}); move them, or leave "
                          "them out with outside=ignore")


def _left_out(reading: Reading, rows: np.ndarray, groups: list[Group], row_places: np.ndarray
              ) -> dict[str, int]:
    """How many images are not converted, by reason."""
    found: Counter[str] = Counter()
    for group, count in Counter(rows["group"][row_places < 0].tolist()).items():
        folder = groups[group]
        why = reading.left_out.get(folder) if isinstance(folder, str) else None
        found[why or "images outside class folders"] += count
    return dict(found)


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
        tree = json.loads(WorkPaths(dst).plan.read_bytes())
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
    order = np.lexsort((hashes, labels))
    chosen, owed, start = [], 0.0, 0
    for members in np.unique(labels, return_counts=True)[1].tolist():
        owed += fraction * members
        count = min(round(owed), max(members - 1, 1))
        owed -= count
        chosen.append(order[start:start + count])
        start += members
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
