"""`resnet-dist verify`: is a data set what its manifest says, to the last bit?

Every file is read once: its SHA-256 finds any change at all, its structure and the samples' own
hashes say where. `deep` decodes every image as well. Problems are collected, not raised, so that
one run names them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion.finish import seal_of
from data_prep.conversion.progress import Ticker
from data_prep.encode import jpeg
from data_prep.encode.jpeg import JpegError
from data_prep.shards.beton import MODE_JPEG, Damaged, ShardIndex, digest, read_index
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import Manifest, dump_manifest, load_manifest
from resnet_dist.run.paths import DatasetPaths

BLOCK = 1 << 22


@dataclass
class Report:
    """What `verify` found. `problems` is empty where the data set is whole."""

    dst: Path
    deep: bool
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)
    class_counts: dict[str, list[int]] = field(default_factory=dict)  # of a split, by label

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary_rows(self) -> list[tuple[str, str]]:
        """(what, value) lines that describe the data set to a person."""
        manifest = self.manifest
        if manifest is None:
            return []
        size = "x".join(map(str, manifest.image_size)) if manifest.image_size else "various"
        rows = [("name", manifest.name), ("classes", f"{manifest.num_classes}: "
                                          + _few(manifest.classes))]
        for name, split in manifest.splits.items():
            total = sum(shard.bytes for shard in split.shards)
            counts = self.class_counts.get(name)
            balance = f", {min(counts):,} to {max(counts):,} a class" if counts else ""
            rows.append((f"split {name}", f"{split.samples:,} images{balance}, "
                         f"{len(split.shards):,} shards, {_bytes(total)}"))
        rows += [("image size", size),
                 ("encoding", ", ".join(f"{key}={value}" for key, value
                                        in manifest.encoding.items() if value is not None
                                        and not isinstance(value, dict))),
                 ("mean RGB", " ".join(f"{value:.4f}" for value in manifest.mean)),
                 ("std RGB", " ".join(f"{value:.4f}" for value in manifest.std)),
                 ("source", f"{manifest.source.get('kind')} {manifest.source.get('name')}, "
                            f"{manifest.source.get('rejected', 0)} images rejected"),
                 ("verified", "hashes, structure" + (", every image decoded" if self.deep else "")
                  if self.ok else f"{len(self.problems)} PROBLEMS")]
        return rows

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.dst), "ok": self.ok, "deep": self.deep,
                "problems": self.problems, "class_counts": self.class_counts,
                "summary": dict(self.summary_rows())}


def verify(dst: Path, deep: bool = False, progress: bool = False) -> Report:
    """Read a whole data set and report every damaged shard, and sample where one is to blame."""
    dst = Path(dst)
    report = Report(dst, deep)
    try:
        manifest = report.manifest = load_manifest(dst)
    except ConfigError as error:
        report.problems.append(str(error))
        return report
    shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
    _check_manifest(dst, manifest, report)
    _check_pixel_mean(dst, manifest, report)
    _check_strays(dst, manifest, report)
    with Ticker(f"verify {dst.name}", sum(shard.samples for _, shard in shards), "images",
                progress) as ticker:
        for split, shard in shards:
            problems, labels = check_shard(dst / shard.file, shard.samples, shard.bytes,
                                           shard.sha256, manifest.num_classes, deep)
            report.problems += [f"{shard.file}: {problem}" for problem in problems]
            counts = report.class_counts.setdefault(split, [0] * manifest.num_classes)
            for label, count in enumerate(np.bincount(labels, minlength=manifest.num_classes)):
                counts[label] += int(count)
            ticker.add(shard.samples)
    return report


def check_shard(path: Path, samples: int, length: int, sha256: str, classes: int,
                deep: bool) -> tuple[list[str], np.ndarray]:
    """Problems of one shard, and the labels of its samples (int64 [n], empty where unreadable)."""
    nothing = np.zeros(0, np.int64)
    try:
        actual = path.stat().st_size
        if actual != length:
            return [f"has {actual} bytes, the manifest says {length}"], nothing
        intact = _sha256(path) == sha256
        index = read_index(path)
    except FileNotFoundError:
        return ["is missing"], nothing
    except OSError as error:
        return [f"cannot be read: {error.strerror}"], nothing
    except Damaged as damage:
        return [str(damage)], nothing
    labels = index.samples["f1"].copy()
    if len(index.samples) != samples:
        return [f"has {len(labels)} samples, the manifest says {samples}"], nothing
    problems = []
    if (labels >= classes).any():
        where = int(np.argmax(labels >= classes))
        problems.append(f"sample {where}: label {labels[where]} of {classes} classes")
        labels = nothing
    problems += list(_check_samples(path, index, deep))
    if not intact and not problems:
        problems.append("its SHA-256 is not the manifest's (a byte outside the samples differs)")
    return problems, labels


def _check_samples(path: Path, index: ShardIndex, deep: bool) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, (row, size) in enumerate(zip(index.samples, index.sizes, strict=True)):
            image = row["f0"]
            file.seek(int(image["data_ptr"]))
            data = file.read(int(size))
            if digest(data) != int(row["f2"]):
                yield f"sample {number}: its bytes do not match its hash"
            elif int(image["mode"]) == MODE_JPEG:
                width, height = int(image["width"]), int(image["height"])
                reason = _check_jpeg(data, width, height, deep)
                if reason:
                    yield f"sample {number}: {reason}"


def _check_jpeg(data: bytes, width: int, height: int, deep: bool) -> str | None:
    """The JPEG's header must say what the metadata says; `deep`: and every pixel must decode."""
    try:
        header = jpeg.inspect(data)
        if (header.width, header.height) != (width, height):
            return (f"its JPEG has {header.width} x {header.height} pixels, the metadata says "
                    f"{width} x {height}")
        if deep:
            jpeg.check(data)
    except JpegError as error:
        return f"its JPEG is damaged ({error})"
    return None


def _check_manifest(dst: Path, manifest: Manifest, report: Report) -> None:
    """The text must be canonical and carry the hash of itself; other files, their recorded one."""
    text = DatasetPaths(dst).manifest.read_bytes()
    seal = manifest.source.get("seal")
    if (text != dump_manifest(manifest).encode()
            or seal != seal_of(manifest)):
        report.problems.append("dataset.json: is not what the conversion wrote")
    for name, sha256 in manifest.source.get("files", {}).items():
        path = dst / Path(name).name
        if not path.is_file():
            report.problems.append(f"{name}: is missing")
        elif _sha256(path) != sha256:
            report.problems.append(f"{name}: its SHA-256 is not the manifest's")


def _check_pixel_mean(dst: Path, manifest: Manifest, report: Report) -> None:
    if manifest.pixel_mean_sha256 is None:
        return
    path = DatasetPaths(dst).pixel_mean
    if not path.is_file():
        report.problems.append(f"{path.name}: is missing")
    elif _sha256(path) != manifest.pixel_mean_sha256:
        report.problems.append(f"{path.name}: its SHA-256 is not the manifest's")


def _check_strays(dst: Path, manifest: Manifest, report: Report) -> None:
    known = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for name in manifest.splits:
        for path in sorted((dst / name).glob("*.beton")):
            if f"{name}/{path.name}" not in known:
                report.problems.append(f"{name}/{path.name}: is not in the manifest")


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 6 else (*names[:3], "...", *names[-2:]))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"
