"""A look at a data set: one sheet of its images and the histogram of its classes, as PNG files.

Made from the finished shards, so that a person sees what will be trained on: swapped channels,
wrong labels and lost classes show at a glance.
"""

from __future__ import annotations

import io
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.encode import jpeg
from resnet_dist.data.shards.beton import MODE_RAW
from resnet_dist.data.shards.manifest import PILLOW_LETTERS, legible
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.shards.sheet import CELL, INK, PAPER, contact_sheet

COLUMNS, ROWS = 12, 8
LETTERS = 16  # of a class's name: as many as fit
SHEET = "contact_sheet.png"
HISTOGRAM = "class_histogram.png"
BARS = ((58, 110, 165), (210, 120, 60), (90, 150, 90))


def sheet_of(reader: ShardReader) -> bytes:
    """PNG of up to 96 images: one of each class where there are as many classes, or several;
    always the same ones for the same shards."""
    names = legible(reader.manifest.classes, PILLOW_LETTERS, LETTERS)
    chosen = _chosen(reader.labels)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # a decoder holds no lock
        pictures = list(threads.map(partial(_small, reader), chosen))
    captions = [(names[reader.labels[sample]],) for sample in chosen]
    return _png(contact_sheet(pictures, captions, COLUMNS, COLUMNS * ROWS))


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


def _small(reader: ShardReader, sample: int) -> np.ndarray:
    """uint8 RGB [h, w, 3] of one sample, shrunk by a whole factor if it is large."""
    image, data = reader.metadata["f0"][sample], reader.read(sample)
    width, height = int(image["width"]), int(image["height"])
    if int(image["mode"]) == MODE_RAW:
        return data.reshape(height, width, 3)
    scale = max(1, min(width, height) // CELL)
    return jpeg.decode(data.tobytes(), width // scale, height // scale)


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
