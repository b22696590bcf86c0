"""`resnet-dist verify`: is a data set what its manifest says, to the last bit?

Every file is read once: its SHA-256 finds any change at all, its structure and the samples' own
hashes say where. `deep` decodes every image as well. Problems are collected, not raised, so that
one run names them all. Warnings are of a whole data set that teaches or measures badly: classes of
very unequal size, classes that a split lacks, images that stand in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion.finish import seal_of
from data_prep.conversion.progress import Ticker
from data_prep.encode import jpeg
from data_prep.encode.jpeg import JpegError
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.beton import MODE_JPEG, Damaged, ShardIndex, digest, read_index
from resnet_dist.data.shards.manifest import Manifest, dump_manifest, load_manifest
from resnet_dist.run.paths import DatasetPaths

IMBALANCE = 100  # images of the largest class for one of the smallest, from which a split is told
NAMED = 5  # classes or images in a warning
SAMPLE = np.dtype([("label", "<i8"), ("hash", "<u8")])


@dataclass
class Report:
    """What `verify` found. `problems` is empty where the data set is whole."""

    dst: Path
    deep: bool
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
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
                "problems": self.problems, "warnings": self.warnings,
                "class_counts": self.class_counts, "summary": dict(self.summary_rows())}


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
    _check_strays(dst, manifest, report)
    found: dict[str, list[np.ndarray]] = {name: [] for name in manifest.splits}
    with Ticker(f"verify {dst.name}", sum(shard.samples for _, shard in shards), "images",
                progress) as ticker:
        for split, shard in shards:
            problems, samples = check_shard(dst / shard.file, shard.samples, shard.bytes,
                                            shard.sha256, manifest.num_classes, deep)
            report.problems += [f"{shard.file}: {problem}" for problem in problems]
            found[split].append(samples)
            ticker.add(shard.samples)
    counts = {split: sum((np.bincount(samples["label"], minlength=manifest.num_classes)
                          for samples in shards), np.zeros(manifest.num_classes, np.int64))
              for split, shards in found.items()}
    report.class_counts = {split: count.tolist() for split, count in counts.items()}
    if report.ok:  # else what is missing may be what a warning would be about
        report.warnings += [*_balance(manifest, counts), *_duplicates(manifest, found)]
    return report


def _balance(manifest: Manifest, counts: dict[str, np.ndarray]) -> Iterator[str]:
    for split, count in counts.items():
        empty = np.flatnonzero(count == 0)
        if len(empty):
            names = _few([manifest.classes[label] for label in empty])
            yield (f"split {split}: has no image of {len(empty):,} of {manifest.num_classes:,} "
                   f"classes ({names}); " + ("they cannot be learnt" if split == "train" else
                                             "its accuracy says nothing of them"))
        most, least = int(np.argmax(count)), int(np.argmin(np.where(count, count, count.max() + 1)))
        if count[most] >= IMBALANCE * count[least]:
            yield (f"split {split}: {count[most]:,} images of {manifest.classes[most]!r} and "
                   f"{count[least]:,} of {manifest.classes[least]!r}: more than {IMBALANCE} to 1; "
                   "accuracy by class will tell more than the mean")


def _duplicates(manifest: Manifest, found: dict[str, list[np.ndarray]]) -> Iterator[str]:
    """Images with the same bytes in two splits, by their hashes."""
    whole = {split: np.concatenate(shards) for split, shards in found.items()}
    for one, other in combinations(whole, 2):
        twice, here, there = np.intersect1d(whole[one]["hash"], whole[other]["hash"],
                                            return_indices=True)
        if not len(twice):
            continue
        order = np.argsort(here)[:NAMED]
        pairs = [f"{_place(manifest, one, int(here[i]))} = {_place(manifest, other, int(there[i]))}"
                 for i in order]
        more = f", and {len(twice) - len(pairs):,} more" if len(twice) > len(pairs) else ""
        unlike = np.count_nonzero(whole[one]["label"][here] != whole[other]["label"][there])
        words = f", {unlike:,} of them with another label" if unlike else ""
        yield (f"{len(twice):,} images are in {one} and in {other} as well{words} "
               f"({', '.join(pairs)}{more}); what was trained on measures nothing")


def _place(manifest: Manifest, split: str, sample: int) -> str:
    """`val/shard-00001.beton sample 3`."""
    for shard in manifest.splits[split].shards:
        if sample < shard.samples:
            return f"{shard.file} sample {sample}"
        sample -= shard.samples
    raise AssertionError("more samples than the manifest has")


def check_shard(path: Path, samples: int, length: int, sha256: str, classes: int,
                deep: bool) -> tuple[list[str], np.ndarray]:
    """Problems of one shard, and labels and hashes of its samples (SAMPLE [n]; empty where
    unreadable)."""
    nothing = np.zeros(0, SAMPLE)
    try:
        actual = path.stat().st_size
        if actual != length:
            return [f"has {actual} bytes, the manifest says {length}"], nothing
        intact = _sha256(path) == sha256
        with open(path, "rb") as file:
            index = read_index(file.fileno())
    except FileNotFoundError:
        return ["is missing"], nothing
    except OSError as error:
        return [f"cannot be read: {error.strerror}"], nothing
    except Damaged as damage:
        return [str(damage)], nothing
    if len(index.samples) != samples:
        return [f"has {len(index.samples)} samples, the manifest says {samples}"], nothing
    told = np.empty(samples, SAMPLE)
    told["label"], told["hash"] = index.samples["f1"], index.samples["f2"]
    labels, problems = told["label"], []
    if (wrong := (labels < 0) | (labels >= classes)).any():
        where = int(np.argmax(wrong))
        problems.append(f"sample {where}: label {labels[where]} of {classes} classes")
        told = nothing
    problems += list(_check_samples(path, index, deep))
    if not intact and not problems:
        problems.append("its SHA-256 is not the manifest's (a byte outside the samples differs)")
    return problems, told


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
    files = dict(manifest.source.get("files", {}))
    if manifest.pixel_mean_sha256 is not None:
        files[DatasetPaths(dst).pixel_mean.name] = manifest.pixel_mean_sha256
    for name, sha256 in files.items():
        path = dst / Path(name).name
        if not path.is_file():
            report.problems.append(f"{name}: is missing")
        elif _sha256(path) != sha256:
            report.problems.append(f"{name}: its SHA-256 is not the manifest's")


def _check_strays(dst: Path, manifest: Manifest, report: Report) -> None:
    known = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for name in manifest.splits:
        for path in sorted((dst / name).glob("*.beton")):
            if f"{name}/{path.name}" not in known:
                report.problems.append(f"{name}/{path.name}: is not in the manifest")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= NAMED + 1 else (*names[:3], "...", *names[-2:]))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"
