"""One shard of a plan: read its images, encode them, write the file, then its record.

The record is the commit: it is written after the shard is on disk, and a shard with a fitting
record is done for good. Both are functions of the plan alone, so any worker, task or second attempt
writes the same bytes.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.conversion.plan import Plan, ShardId
from data_prep.encode import jpeg
from data_prep.encode.facts import PLAIN
from data_prep.encode.facts import count as count_facts
from data_prep.encode.images import Encoding, encode
from data_prep.encode.jpeg import JpegError
from data_prep.shards.write import Stored, write_shard
from data_prep.sources.found import Reader, ReadsAhead, Unreadable
from resnet_dist.run.atomic import write_atomically

AHEAD = 8  # images that the disk is asked for before they are needed
SMALL_IMAGE_PIXELS = 128 * 128  # up to here a per-pixel mean is kept


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard. `samples` may be 0: then there is no file."""

    key: str
    samples: int
    bytes: int
    sha256: str
    index_xxh3: str  # `index_digest` of the shard
    measured: int  # images that the sums are of, see `measure_every`
    pixels: int  # that the sums are of
    sums: tuple[int, int, int]  # of the stored pixels, per channel
    squares: tuple[int, int, int]
    image_size: tuple[int, int] | None  # (height, width) where all images share one
    rejected: tuple[tuple[str, str], ...]  # (name, reason)
    facts: dict[str, int]  # see `encode.facts`


def encoding_of(plan: Plan) -> Encoding:
    options = plan.options | {"image": plan.options["encoding"]}
    return Encoding(**{field.name: options[field.name] for field in fields(Encoding)})


@dataclass(frozen=True)
class Encoded:
    """A shard in memory: what its file and its record will hold."""

    shard: ShardId
    samples: list[Stored]
    rejected: tuple[tuple[str, str], ...]
    facts: Counter[str]
    totals: np.ndarray  # int64 [6]: sums and squares
    measured: int
    pixels: int
    image_size: tuple[int, int] | None
    per_pixel: np.ndarray | None  # int64 [height, width, 3]


def convert_shard(plan: Plan, shard: ShardId, reader: Reader, encoding: Encoding,
                  tick: Callable[[str], None]) -> Record:
    """Make one shard and its record. `tick` is called with a name before each image.

    Memory: the shard's encoded images and one decoded image.
    """
    return save_shard(plan, encode_shard(plan, shard, reader, encoding, tick))


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Pillow warns of every odd tag in millions of files; what matters is counted or refused."""
    pillow = logging.getLogger("PIL")
    level = pillow.level
    pillow.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pillow.setLevel(level)


@_quiet_libraries()
def encode_shard(plan: Plan, shard: ShardId, reader: Reader, encoding: Encoding,
                 tick: Callable[[str], None]) -> Encoded:
    """The work of a processor: read and encode every image of a shard."""
    rows, names = plan.shard_rows(shard)
    stored: list[Stored] = []
    rejected: list[tuple[str, str]] = []
    seen: Counter[str] = Counter()
    totals, measured, measured_pixels = np.zeros(6, np.int64), 0, 0
    every = measure_every(plan.split(shard.split).samples)
    sizes: set[tuple[int, int]] = set()
    per_pixel: np.ndarray | None = None
    places = zip(rows["container"].tolist(), rows["offset"].tolist(), rows["size"].tolist(),
                 rows["label"].tolist(), names, strict=True)
    soon = reader.soon if isinstance(reader, ReadsAhead) else None
    ahead = zip(names[AHEAD:], rows["container"][AHEAD:].tolist(), strict=True)
    for container, offset, size, label, name in places:
        tick(name)
        if soon and (following := next(ahead, None)):
            soon(*following)
        try:
            image = encode(reader.read(name, container, offset, size), encoding, name)
            pixels = None
            if every == 1 or image.height * image.width <= SMALL_IMAGE_PIXELS:
                pixels, count = image.pixels(), image.height * image.width
                jpeg.add_sums(pixels, totals)
            else:
                count = image.add_row_sums(every, _first_row(name, every), totals)
        except (Unreadable, JpegError) as reason:
            rejected.append((name, str(reason)))
            continue
        stored.append(Stored(image.mode, image.width, image.height, image.data, label))
        if image.facts is not PLAIN:
            count_facts(image.facts, seen)
        sizes.add((image.height, image.width))
        measured += count > 0
        measured_pixels += count
        if pixels is not None and pixels.size <= 3 * SMALL_IMAGE_PIXELS and len(sizes) == 1:
            if per_pixel is None:
                per_pixel = np.zeros(pixels.shape, np.int64)
            per_pixel += pixels
    one_size = len(sizes) == 1
    return Encoded(shard, stored, tuple(rejected), seen, totals, measured, measured_pixels,
                   next(iter(sizes)) if one_size else None, per_pixel if one_size else None)


def save_shard(plan: Plan, made: Encoded) -> Record:
    """The work of the disk: the shard's file, then its record."""
    shard = made.shard
    length, sha, index = (write_shard(plan.shard_path(shard), made.samples) if made.samples
                          else (0, "", ""))
    if made.per_pixel is not None:
        buffer = io.BytesIO()
        np.save(buffer, made.per_pixel)
        write_atomically(plan.work.pixel_sums(shard), buffer.getvalue())
    record = Record(key=plan.key, samples=len(made.samples), bytes=length, sha256=sha,
                    index_xxh3=index, measured=made.measured, pixels=made.pixels,
                    sums=_triple(made.totals[:3]), squares=_triple(made.totals[3:]),
                    image_size=made.image_size, rejected=made.rejected,
                    facts=dict(made.facts))
    write_atomically(plan.work.record(shard), json.dumps(asdict(record), sort_keys=True))
    return record


def measure_every(samples: int) -> int:
    """One row of MCUs in so many is decoded for mean and standard deviation, over all large images
    of a split; of small images, all pixels are.

    Decoding whole images costs more than all other work on those that are kept as they are, and
    rows of many images say more than as many pixels of few.
    """
    return min(max(samples // 32, 1), 128)


def _first_row(name: str, every: int) -> int:
    """So that every row of an image has the same chance, whatever the other images are."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape")) % every


def _triple(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def read_record(plan: Plan, shard: ShardId) -> Record | None:
    """The record of a shard that is done, else None: no record, of another plan, or the file is
    not there at its full length."""
    try:
        tree: dict[str, Any] = json.loads(plan.work.record(shard).read_bytes())
        record = Record(**tree | {
            "sums": tuple(tree["sums"]), "squares": tuple(tree["squares"]),
            "image_size": tuple(tree["image_size"]) if tree["image_size"] else None,
            "rejected": tuple((name, reason) for name, reason in tree["rejected"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    if record.key != plan.key:
        return None
    if record.samples and _length(plan.shard_path(shard)) != record.bytes:
        return None
    return record


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
