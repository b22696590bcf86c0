"""Thousands of mutated files and archives: refused or converted right, never a crash or a hang.

The oracle for "right": Pillow, told to be strict, and libjpeg's own judgement of its warnings."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from data_prep.convert import ConvertError, convert
from data_prep.encode import jpeg
from data_prep.encode.images import Encoding, encode
from data_prep.sources import tars
from data_prep.sources.found import Unreadable
from data_prep.verify import verify
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.beton import Damaged, read_index
from resnet_dist.data.shards.manifest import load_manifest
from tests.unit.data_prep.material import (
    file_bytes,
    make_tree,
    options,
    picture,
    read_back,
    tar_bytes,
)

KEEP = Encoding(image="jpeg", raw_fraction=0.5, longer_side=None, shorter_side=None, quality=90,
                keep=True, exif="ignore", max_pixels=500_000)
RAW = Encoding(image="raw", raw_fraction=0.5, longer_side=None, shorter_side=None, quality=90,
               keep=True, exif="ignore", max_pixels=500_000)


SHRINK = Encoding(image="jpeg", raw_fraction=0.5, longer_side=40, shorter_side=None, quality=90,
                  keep=True, exif="ignore", max_pixels=500_000)


def seeds() -> list[bytes]:
    image = picture(7, 70, 50)
    return [file_bytes(image, quality=80), file_bytes(image, quality=95, subsampling=0),
            file_bytes(image, quality=60, optimize=True), file_bytes(image.convert("L")),
            file_bytes(image, quality=80, restart_marker_blocks=2),
            file_bytes(image, quality=80, progressive=True), file_bytes(image.convert("CMYK")),
            file_bytes(image, "PNG"), file_bytes(image.convert("P"), "PNG"),
            file_bytes(image, "GIF"), file_bytes(image, "BMP"), file_bytes(image, "WEBP"),
            file_bytes(image, "TIFF"), file_bytes(image, "PPM")]


def mutated(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        if not out:
            break
        at = draw.randrange(len(out) if draw.random() < 0.5 else min(len(out), 700))
        match draw.randrange(6):
            case 0:
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))
            case 2:
                del out[at:at + draw.choice((1, 2, 16, 300))]
            case 3:
                out[at:at] = draw.randbytes(draw.choice((1, 2, 16)))
            case 4:
                out = out[:at]
            case 5:
                other = draw.randrange(len(out))
                out[at:at + 8] = out[other:other + 8]
    return bytes(out)


def check_one(data: bytes) -> bool:
    """Encode in every way; True where it was usable. Raises where the result is wrong."""
    kept, raw, shrunk, why = None, None, None, ""
    try:
        kept = encode(data, KEEP, "n")
    except Unreadable as error:
        why = str(error)
    try:
        raw = encode(data, RAW, "n")
    except Unreadable:
        assert kept is None, "kept, but cannot be decoded"
    with contextlib.suppress(Unreadable):
        shrunk = encode(data, SHRINK, "n")
    assert (shrunk is None) == (raw is None), "a size limit changes what is readable"
    if shrunk is not None:
        jpeg.check(shrunk.data)
    if kept is None or raw is None:
        # Keeping asks for more: every coefficient must be one that a JPEG can hold.
        assert raw is None or "coefficient out of range" in why
        return False
    pixels = raw.pixels()
    if data[:3] == b"\xff\xd8\xff":
        try:
            reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except UnidentifiedImageError:  # garbage between headers, which libjpeg skips by right
            reference = pixels
        np.testing.assert_array_equal(pixels, reference)
        if jpeg.inspect(data).is_common:
            np.testing.assert_array_equal(kept.pixels(), pixels)
    jpeg.check(kept.data)
    assert kept.pixels().shape == pixels.shape
    return True


def fuzz(cases: int, seed: int) -> tuple[int, float]:
    draw, files, usable, slowest = random.Random(seed), seeds(), 0, 0.0
    for _ in range(cases):
        data = mutated(draw.choice(files), draw)
        start = time.thread_time()
        usable += check_one(data)
        slowest = max(slowest, time.thread_time() - start)
    return usable, slowest


def test_two_thousand_mutated_images_are_refused_or_right():
    usable, slowest = fuzz(2000, seed=1)
    assert 100 < usable < 1900  # both sides are exercised
    assert slowest < 5


@pytest.mark.slow
def test_a_hundred_thousand_mutated_images_are_refused_or_right():
    fuzz(100_000, seed=2)


def test_a_data_set_of_mutated_images_converts_and_verifies(tmp_path):
    draw, files = random.Random(3), seeds()
    folder = tmp_path / "source" / "train" / "thing"
    folder.mkdir(parents=True)
    expected = 0
    for number in range(300):
        data = mutated(draw.choice(files), draw) if number % 3 else files[number % len(files)]
        (folder / f"{number:04d}.jpg").write_bytes(data)
        try:
            encode(data, KEEP, "n")
            expected += 1
        except Unreadable:
            pass
    manifest = convert(str(tmp_path / "source"), tmp_path / "dst",
                       options("max_rejected=300", "max_pixels=500000", "exif=ignore",
                               "accept=[one_class]"))
    assert manifest.splits["train"].samples == expected
    assert verify(tmp_path / "dst", deep=True).ok
    assert len(read_back(tmp_path / "dst", "train")) == expected


def test_mutated_tars_are_refused_or_give_only_their_own_bytes(tmp_path):
    draw = random.Random(4)
    images = [(f"train/c{n % 3}/{n}.jpg", file_bytes(picture(n, 20, 20))) for n in range(9)]
    whole = tar_bytes(images)
    path = tmp_path / "s.tar"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 6))):
            at = draw.randrange(len(data) // 512) * 512 + draw.randrange(
                512 if draw.random() < 0.5 else 160)
            data[min(at, len(data) - 1)] = draw.randrange(256)
        path.write_bytes(data[:draw.randrange(len(data))] if draw.random() < 0.2 else data)
        source = tars.PlainFile(path)
        try:
            for member in tars.members(source):
                assert member.offset + member.size <= path.stat().st_size
                assert ".." not in member.name.split("/")
                assert not member.name.startswith("/")
        except tars.SourceError:
            pass
        finally:
            source.close()


def test_tars_with_valid_checksums_and_wild_fields_are_refused_or_bounded(tmp_path):
    draw = random.Random(5)
    path = tmp_path / "s.tar"
    for _ in range(300):
        info = tarfile.TarInfo("train/a/0.jpg")
        info.size = 100
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(3):
            start, stop = draw.choice(((0, 100), (124, 136), (156, 157), (257, 265), (345, 500)))
            header[start:stop] = draw.randbytes(stop - start)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        path.write_bytes(bytes(header) + draw.randbytes(512) + bytes(1024))
        try:
            convert(str(path), tmp_path / "dst", options("max_rejected=9"))
        except (ConfigError, ConvertError):
            continue
        raise AssertionError("random bytes made a data set")


def test_mutated_shards_never_pass_and_never_crash(tmp_path):
    convert(str(make_tree(tmp_path / "source", splits=("train",))), tmp_path / "dst",
            options("shard_samples=12"))
    manifest = load_manifest(tmp_path / "dst")
    path = tmp_path / "dst" / manifest.splits["train"].shards[0].file
    whole, draw = path.read_bytes(), random.Random(6)
    table = len(whole) - 12 * 24
    for _ in range(300):
        data = bytearray(whole)
        where = draw.choice(((0, 24), (24, 3147), (3147, 3147 + 12 * 32), (table, len(data))))
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(*where)] = draw.randrange(256)
        if bytes(data) == whole:
            continue
        path.write_bytes(data)
        try:
            with open(path, "rb") as file:
                index = read_index(file.fileno())
            assert (index.pointers + index.sizes <= len(data)).all()
        except Damaged:
            pass
        assert verify(tmp_path / "dst").problems


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_two_hundred_flipped_bits_anywhere_in_a_data_set_are_all_found(tmp_path):
    convert(str(make_tree(tmp_path / "source")), tmp_path / "dst", options("shard_samples=12"))
    files = sorted(path for path in (tmp_path / "dst").rglob("*") if path.is_file())
    draw = random.Random(7)
    for trial in range(200):
        path = draw.choice(files)
        # Three quarters of a small shard are padding: half of the flips go elsewhere.
        end = path.stat().st_size if trial % 2 or path.suffix != ".beton" else 3147 + 12 * 32
        bit = draw.randrange(8 * end)
        flip(path, bit)
        problems = verify(tmp_path / "dst").problems
        assert problems, f"bit {bit} of {path.name}"
        assert path.name in problems[0]
        flip(path, bit)
    assert verify(tmp_path / "dst").ok
