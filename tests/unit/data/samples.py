"""Small real data sets for the loader's tests, written by FFCV's own DatasetWriter."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image

from resnet_dist.data.decode import decoder
from resnet_dist.data.shards.beton import METADATA_START, SAMPLE, digest, index_digest
from resnet_dist.data.shards.manifest import Manifest, Shard, Split, dump_manifest

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture with texture and saturated edges: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int64) + rng.integers(-6, 7, smooth.shape)
    noisy[height // 3:height // 2, width // 4:width // 2] = rng.integers(0, 256, 3)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, *, quality: int = 90, restart: bool = True, subsampling: int = 2,
         **options: object) -> bytes:
    """4:2:0 unless `subsampling` is 0 (4:4:4) or 1 (4:2:2); one restart marker per MCU row."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=subsampling,
                                 restart_marker_rows=int(restart), **options)
    return stream.getvalue()


def decoded(stream: bytes) -> np.ndarray:
    """Pillow's pixels: uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))


Sample = tuple[bytes, int, int, int, int]  # stored bytes, mode, height, width, label


def jpeg_sample(seed: int, label: int, height: int, width: int, **options: object) -> Sample:
    return jpeg(picture(seed, height, width), **options), decoder.JPEG, height, width, label


def raw_sample(seed: int, label: int, height: int, width: int) -> Sample:
    return picture(seed, height, width).tobytes(), decoder.RAW, height, width, label


class _Rows:
    def __init__(self, samples: list[Sample], digests: bool):
        self.samples, self.digests = samples, digests

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, int, int]:
        sample = self.samples[index]
        return sample, sample[4], digest(sample[0]) if self.digests else 0


def _stored_bytes_field() -> RGBImageField:
    """FFCV's image field, but writing bytes that are already encoded."""
    def encode(destination, sample, malloc):
        data, mode, height, width, _ = sample
        destination["mode"], destination["height"], destination["width"] = mode, height, width
        destination["data_ptr"], storage = malloc(len(data))
        storage[:] = np.frombuffer(data, np.uint8)

    handler = RGBImageField()
    handler.encode = encode
    return handler


def write_dataset(root: Path, splits: dict[str, list[list[Sample]]], *, classes: int = 10,
                  image_size: tuple[int, int] | None = None, digests: bool = True,
                  pixel_mean: np.ndarray | None = None) -> Path:
    """A data set directory whose split `name` has one shard for each list of samples."""
    written = {}
    for name, shards in splits.items():
        (root / name).mkdir(parents=True)
        records = []
        for index, samples in enumerate(shards):
            file = root / name / f"shard-{index:05d}.beton"
            fields = {"image": _stored_bytes_field(), "label": IntField(), "digest": IntField()}
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
                DatasetWriter(str(file), fields, page_size=1 << 21,
                              num_workers=1).from_indexed_dataset(_Rows(samples, digests))
            records.append(_record(root, file, len(samples)))
        written[name] = Split(samples=sum(r.samples for r in records), shards=tuple(records))
    sha = None
    if pixel_mean is not None:
        np.save(root / "pixel_mean.npy", pixel_mean.astype(np.float32))
        sha = hashlib.sha256((root / "pixel_mean.npy").read_bytes()).hexdigest()
    manifest = Manifest(format_version=1, name="samples", classes=tuple(map(str, range(classes))),
                        splits=written, encoding={}, mean=(0.49, 0.45, 0.41), std=(0.2, 0.21, 0.22),
                        image_size=image_size, pixel_mean_sha256=sha, source={})
    (root / "dataset.json").write_text(dump_manifest(manifest))
    return root


def _record(root: Path, file: Path, samples: int) -> Shard:
    data = file.read_bytes()
    head = METADATA_START + samples * SAMPLE.itemsize
    return Shard(file=str(file.relative_to(root)), samples=samples, bytes=len(data),
                 sha256=hashlib.sha256(data).hexdigest(),
                 index_xxh3=index_digest(data[:head], data[-24 * samples:]))


def photographs(count: int) -> list[bytes]:
    """The first ImageNet photographs of the shared folder, as their own JPEG bytes."""
    archive = SHARED / "imagenet-sample-500.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is missing: photographs are not part of the project")
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if len(found) == count:
                break
            if member.isfile() and member.name.endswith(".JPEG"):
                stream = tar.extractfile(member)
                assert stream is not None
                found.append(stream.read())
    return found
