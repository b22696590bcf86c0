"""The end of a conversion: statistics over all shards, rejected images, pictures, manifest last.

In: a plan whose shards all have records. Out: `dataset.json`, which commits the data set; the
working files are removed after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_prep.conversion import account, look
from data_prep.conversion.plan import Plan, ShardId
from data_prep.conversion.pool import ConvertError
from data_prep.conversion.write import Record, read_record
from data_prep.encode import facts
from data_prep.options import ENCODING
from data_prep.sources.found import printable
from resnet_dist.data.shards.manifest import (
    FORMAT_VERSION,
    Manifest,
    Shard,
    Split,
    dump_manifest,
    load_manifest,
    manifest_fingerprint,
)
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.run.atomic import write_atomically
from resnet_dist.run.paths import DatasetPaths

Triple = tuple[float, float, float]
Records = dict[ShardId, Record]


def finish(plan: Plan, name: str, max_rejected: int) -> Manifest:
    """Write the manifest; with `plan.append`, one that joins the new splits to those there.

    Raises: ConvertError where a shard is missing or too many images were rejected.
    """
    records: Records = {}
    for shard in plan.shards():
        record = read_record(plan, shard)
        if record is None:
            raise ConvertError(f"{shard}: is not converted yet; run the same command again")
        records[shard] = record
    paths = DatasetPaths(plan.dst)
    base = load_manifest(plan.dst) if plan.append else None
    rejected = _write_rejected(records, paths, base)
    if rejected > max_rejected:
        reasons = account.by_number(_described(plan, records)["rejected_reasons"])
        raise ConvertError(
            f"{rejected} of {sum(split.samples for split in plan.splits)} images could not be "
            f"used, more than max_rejected = {max_rejected} ({reasons}); {paths.rejected} names "
            f"them with reasons. Repair them, or run again with max_rejected={rejected}")
    splits = _splits(plan, records)
    manifest = _new(plan, records, splits, name, paths) if base is None else _joined(
        base, plan, records, splits, paths)
    source = manifest.source | {"files": _pictures(plan.dst, manifest)
                                | _hashes([paths.rejected])}
    if base is None:
        source |= {"rejected": rejected}
    manifest = sealed(changed(manifest, source=source))
    for split in plan.splits:
        for leftover in (plan.dst / split.name).glob(".*.tmp"):  # of attempts that were killed
            leftover.unlink(missing_ok=True)
    write_atomically(paths.manifest, dump_manifest(manifest))
    shutil.rmtree(plan.work.root)
    return manifest


def _splits(plan: Plan, records: Records) -> dict[str, Split]:
    splits = {}
    for split in plan.splits:
        shards = tuple(
            Shard(file=str(shard), samples=record.samples, bytes=record.bytes,
                  sha256=record.sha256, index_xxh3=record.index_xxh3)
            for shard, record in records.items() if shard.split == split.name and record.samples)
        if not shards:
            raise ConvertError(f"split {split.name!r}: not one image of it could be used")
        splits[split.name] = Split(samples=sum(shard.samples for shard in shards), shards=shards)
    return splits


def _new(plan: Plan, records: Records, splits: dict[str, Split], name: str,
         paths: DatasetPaths) -> Manifest:
    trained = "train" if "train" in splits else plan.splits[0].name
    mean, std = _mean_std([record for shard, record in records.items() if shard.split == trained])
    size = _image_size(records)
    measured = sum(record.measured for shard, record in records.items() if shard.split == trained)
    return Manifest(
        format_version=FORMAT_VERSION, name=name, classes=plan.classes, splits=splits,
        encoding={key: plan.options[key] for key in ENCODING} | {
            "codec": plan.identity["codec"]},
        mean=mean, std=std, image_size=size,
        pixel_mean_sha256=_write_pixel_mean(plan, records, trained, paths) if size else None,
        source=_described(plan, records) | {"measured_images": measured})


def _joined(base: Manifest, plan: Plan, records: Records, splits: dict[str, Split],
            paths: DatasetPaths) -> Manifest:
    """The old manifest with the new splits. Mean and deviation stay those of the training split;
    a training split that comes later brings its own."""
    size = base.image_size if _image_size(records) == base.image_size else None
    fields: dict[str, Any] = {
        "splits": dict(base.splits) | splits, "image_size": size,
        "pixel_mean_sha256": base.pixel_mean_sha256 if size else None,
        "source": base.source | {"appended": [*base.source.get("appended", []),
                                              _described(plan, records)]}}
    if "train" in splits:
        fields["mean"], fields["std"] = _mean_std(
            [record for shard, record in records.items() if shard.split == "train"])
        fields["pixel_mean_sha256"] = (_write_pixel_mean(plan, records, "train", paths)
                                       if size else None)
    return changed(base, **fields)


def _described(plan: Plan, records: Records) -> dict[str, Any]:
    reasons = Counter(account.kind_of(reason) for record in records.values()
                      for _, reason in record.rejected)
    return {"kind": plan.kind, "name": plan.source_name, "listing_sha256": plan.listing,
            "split": plan.options["split"], "val_fraction": plan.options["val_fraction"],
            "ignored_files": sum(plan.ignored.values()), "ignored_suffixes": plan.ignored,
            "rejected_reasons": dict(sorted(reasons.items())),
            "facts": facts.total(record.facts for record in records.values())}


def _image_size(records: Records) -> tuple[int, int] | None:
    """(height, width) where all images share one."""
    sizes = {record.image_size for record in records.values() if record.samples}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _write_rejected(records: Records, paths: DatasetPaths, base: Manifest | None) -> int:
    """Number of newly rejected images. The lines of splits that were there before stay."""
    lines = [json.dumps({"split": shard.split, "image": printable(name), "reason": reason})
             for shard, record in records.items() for name, reason in record.rejected]
    old = []
    if base is not None and paths.rejected.exists():
        old = [line for line in paths.rejected.read_text().splitlines()
               if json.loads(line)["split"] in base.splits]
    if lines or old:
        write_atomically(paths.rejected, "\n".join([*old, *lines]) + "\n")
    else:
        paths.rejected.unlink(missing_ok=True)
    return len(lines)


def _mean_std(records: list[Record]) -> tuple[Triple, Triple]:
    """Per channel in [0, 1], from integer sums, so that no order of shards can change a bit."""
    count = sum(record.pixels for record in records)
    if not count:
        raise ConvertError("no image could be measured for mean and standard deviation")
    mean, std = [], []
    for channel in range(3):
        total = sum(record.sums[channel] for record in records)
        squares = sum(record.squares[channel] for record in records)
        mean.append(total / count / 255)
        variance = (squares * count - total * total) / (count * count)
        std.append(variance ** 0.5 / 255)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _write_pixel_mean(plan: Plan, records: Records, split: str, paths: DatasetPaths) -> str | None:
    """float32 [height, width, 3]; None where images are not small."""
    total: np.ndarray | None = None
    count = 0
    for shard, record in records.items():
        if shard.split != split or not record.samples:
            continue
        if not plan.work.pixel_sums(shard).exists():
            return None
        sums = np.load(plan.work.pixel_sums(shard))
        total = sums if total is None else total + sums
        count += record.samples
    assert total is not None
    buffer = io.BytesIO()
    np.save(buffer, (total / count).astype(np.float32))
    write_atomically(paths.pixel_mean, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _pictures(dst: Path, manifest: Manifest) -> dict[str, str]:
    """Contact sheet of the training split and histogram of all; name -> SHA-256."""
    counts = {}
    for name in manifest.splits:
        with ShardReader(dst, name, manifest=manifest) as reader:
            if name == ("train" if "train" in manifest.splits else next(iter(manifest.splits))):
                write_atomically(dst / look.SHEET, look.sheet_of(reader))
            counts[name] = np.bincount(reader.labels, minlength=manifest.num_classes)
    write_atomically(dst / look.HISTOGRAM, look.class_histogram(counts, manifest.classes))
    return _hashes([dst / look.SHEET, dst / look.HISTOGRAM])


def _hashes(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths if path.exists()}


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with a hash of itself, so that `verify` notices a flipped bit in it, too."""
    return changed(manifest, source=manifest.source | {"seal": seal_of(manifest)})


def seal_of(manifest: Manifest) -> str:
    unsealed = {key: value for key, value in manifest.source.items() if key != "seal"}
    return manifest_fingerprint(changed(manifest, source=unsealed))


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    return cast(Manifest, replace(cast(Any, manifest), **fields))
