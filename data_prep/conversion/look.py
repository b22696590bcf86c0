"""A look at a data set: one sheet of its images and the histogram of its classes, as PNG files.

Made from the finished shards, so that a person sees what will be trained on: swapped channels,
wrong labels and lost classes show at a glance.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.encode import jpeg
from data_prep.shards.beton import MODE_RAW, ShardIndex, read_index
from resnet_dist.data.shards.manifest import PILLOW_LETTERS, legible

COLUMNS, ROWS, CELL, TEXT = 12, 8, 112, 16  # pixels
LETTERS = 16  # of a class's name: as many as fit
SHEET = "contact_sheet.png"
HISTOGRAM = "class_histogram.png"
INK, PAPER, BARS = (32, 32, 32), (250, 250, 250), ((58, 110, 165), (210, 120, 60), (90, 150, 90))


def labels_of(shards: Sequence[Path]) -> np.ndarray:
    """int64 [n], in the order of the shards."""
    return np.concatenate([read_index(shard).samples["f1"] for shard in shards])


def contact_sheet(shards: Sequence[Path], classes: tuple[str, ...]) -> bytes:
    """PNG of up to 96 images: one of each class where there are as many classes, or several;
    always the same ones for the same shards."""
    indexes = [read_index(shard) for shard in shards]
    labels = np.concatenate([index.samples["f1"] for index in indexes])
    names = legible(classes, PILLOW_LETTERS, LETTERS)
    starts = np.cumsum([0] + [len(index.samples) for index in indexes])
    sheet = Image.new("RGB", (COLUMNS * CELL, ROWS * (CELL + TEXT)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)

    def thumbnail(sample: int) -> Image.Image:
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        image = Image.fromarray(
            small_sample(shards[shard], indexes[shard], sample - int(starts[shard])))
        image.thumbnail((CELL - 4, CELL - 4), Image.Resampling.BOX)
        if max(image.size) < CELL // 2:  # small images, enlarged without smoothing
            factor = (CELL - 4) // max(image.size)
            image = image.resize((image.width * factor, image.height * factor),
                                 Image.Resampling.NEAREST)
        return image

    chosen = _chosen(labels)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # a decoder holds no lock
        images = list(threads.map(thumbnail, chosen))
    for place, (sample, image) in enumerate(zip(chosen, images, strict=True)):
        x, y = place % COLUMNS * CELL, place // COLUMNS * (CELL + TEXT)
        sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        draw.text((x + 3, y + CELL), names[labels[sample]], INK, font=font)
    return _png(sheet)


def _chosen(labels: np.ndarray) -> list[int]:
    """Sample numbers, spread evenly over classes, and over samples within a class."""
    room = COLUMNS * ROWS
    present = np.unique(labels)
    if len(present) >= room:
        wanted = present[np.arange(room) * len(present) // room]
        return [int(np.flatnonzero(labels == label)[0]) for label in wanted]
    each = room // len(present)
    chosen = []
    for label in present:
        members = np.flatnonzero(labels == label)
        count = min(each, len(members))
        chosen += [int(members[i * len(members) // count]) for i in range(count)]
    return chosen


def small_sample(shard: Path, index: ShardIndex, number: int) -> np.ndarray:
    """uint8 RGB [h, w, 3] of one sample of a shard, shrunk by a whole factor if it is large."""
    image = index.samples["f0"][number]
    width, height = int(image["width"]), int(image["height"])
    with open(shard, "rb") as file:
        file.seek(int(image["data_ptr"]))
        data = file.read(int(index.sizes[number]))
    if int(image["mode"]) == MODE_RAW:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    scale = max(1, min(width, height) // CELL)
    return jpeg.decode(data, width // scale, height // scale)


def class_histogram(counts: dict[str, np.ndarray], classes: tuple[str, ...]) -> bytes:
    """PNG of images a class, one panel a split. counts: int64 [classes] of every split."""
    width, panel, left, under = 1200, 260, 70, 40
    names = legible(classes, PILLOW_LETTERS, LETTERS)
    picture = Image.new("RGB", (width, len(counts) * panel), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for row, (split, count) in enumerate(counts.items()):
        top, bottom = row * panel + 30, (row + 1) * panel - under
        highest = max(int(count.max()), 1)
        step = (width - left - 20) / len(count)
        for label, value in enumerate(count):
            x = left + label * step
            y = bottom - (bottom - top) * int(value) / highest
            draw.rectangle((x, y, max(x + step - (1 if step >= 3 else 0), x), bottom),
                           fill=BARS[row % len(BARS)])
        empty = int((count == 0).sum())
        draw.text((left, top - 24), f"{split}: {int(count.sum()):,} images, {len(count):,} classes"
                  f", {int(count.min()):,} to {highest:,} a class"
                  + (f", {empty:,} EMPTY" if empty else ""), INK, font=font)
        draw.text((8, top - 6), f"{highest:,}", INK, font=font)
        draw.text((8, bottom - 10), "0", INK, font=font)
        every = max(1, int(np.ceil(len(count) * 90 / (width - left))))
        for label in range(0, len(count), every):
            draw.text((left + label * step, bottom + 5), names[label], INK, font=font)
    return _png(picture)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)  # as small as any
    return buffer.getvalue()
