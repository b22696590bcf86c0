"""Small real sources, built by the tests that read them."""

from __future__ import annotations

import ctypes
import hashlib
import io
import mmap
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.convert import ConvertConfig, parse_convert_overrides
from resnet_dist.data.shards import beton
from resnet_dist.data.shards.manifest import load_manifest


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth colour picture with some texture, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def file_bytes(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_tree(root: Path, per_class: int = 4, splits: tuple[str, ...] = ("train", "val")) -> Path:
    seed = 0
    for split in splits:
        for name in ("ant", "bee", "cat"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                seed += 1
                (folder / f"{index}.jpg").write_bytes(
                    file_bytes(picture(seed, 40 + seed % 9, 33 + seed % 7), quality=92))
    return root


def make_tar(path: Path, tree: Path, mode: str = "w:", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as tar:
        for file in sorted(tree.rglob("*")):
            tar.add(file, prefix + str(file.relative_to(tree)), recursive=False)
    return path


def tar_of(path: Path, members: list[tuple[str, bytes]], mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def old_pickle(tree: object) -> bytes:
    """Protocol 2, as CIFAR's archives are."""
    return pickle.dumps(tree, protocol=2)


def options(*items: str) -> ConvertConfig:
    return parse_convert_overrides(list(items))


def hashes(dst: Path) -> dict[str, str]:
    return {str(path.relative_to(dst)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(dst.rglob("*")) if path.is_file()}


def read_back(dst: Path, split: str) -> list[tuple[int, np.ndarray]]:
    """(label, pixels) of every sample, decoded by Pillow straight from the file."""
    samples = []
    for shard in load_manifest(dst).splits[split].shards:
        data = (dst / shard.file).read_bytes()
        with open(dst / shard.file, "rb") as file:
            index = beton.read_index(file.fileno())
        for row, size in zip(index.samples, index.sizes, strict=True):
            at = int(row["f0"]["data_ptr"])
            stored = data[at:at + int(size)]
            if row["f0"]["mode"] == beton.MODE_RAW:
                shape = (int(row["f0"]["height"]), int(row["f0"]["width"]), 3)
                pixels = np.frombuffer(stored, np.uint8).reshape(shape)
            else:
                pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
            samples.append((int(row["f1"]), pixels))
    return samples


def named(dst: Path, split: str) -> list[tuple[str, bytes]]:
    """(class name, pixels) of every sample, sorted: what a data set holds, whatever its order."""
    classes = load_manifest(dst).classes
    return sorted((classes[label], pixels.tobytes()) for label, pixels in read_back(dst, split))


def resident(path: Path) -> float:
    """Share of a file that lies in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        at = np.frombuffer(view, np.uint8).ctypes.data
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(at), ctypes.c_size_t(len(view)), pages)
    return sum(page & 1 for page in pages) / len(pages)
