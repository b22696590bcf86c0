"""`resnet-dist convert`: a source of images becomes a directory of FFCV shards.

scan -> plan on disk -> shards, by any number of workers -> statistics -> dataset.json, the commit
marker. Every step can be killed: the same command again goes on where it stopped, and the bytes are
the same as without the kill.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import PIL
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_prep import jpeg
from data_prep.beton import write_atomically
from data_prep.found import Source
from data_prep.images import Encoding
from data_prep.plan import Plan, ShardId, WorkPaths, load_plan, make_plan
from data_prep.pool import ConvertError, run_shards
from data_prep.progress import Ticker
from data_prep.shards import Record, convert_shard, read_record
from data_prep.sources import open_reader, open_source
from data_prep.tars import SourceError
from resnet_dist.config import (
    NAME_PATTERN,
    ConfigError,
    Count,
    Fraction,
    Natural,
    explain,
    parse_overrides,
)
from resnet_dist.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    Shard,
    Split,
    dump_manifest,
    load_manifest,
    manifest_fingerprint,
)
from resnet_dist.paths import DatasetPaths

log = logging.getLogger(__name__)

__all__ = ["ConvertConfig", "ConvertError", "convert", "parse_convert_overrides"]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `convert`, given as key=value."""

    name: str | None = None  # of the data set; None: the directory's name
    # jpeg: a baseline JPEG within the size limit stays as it is, all else is encoded; raw: pixels;
    # mixed: `raw_fraction` of the images raw, the rest as jpeg; auto: raw where the source gives
    # pixels (digits, CIFAR), else jpeg.
    encoding: Literal["auto", "jpeg", "raw", "mixed"] = "auto"
    raw_fraction: Fraction = 0.5
    keep: bool = True  # False: encode every JPEG again, at `quality`
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    longer_side: Count | None = None  # shrink images whose longer side exceeds it, as FFCV does
    shorter_side: Count | None = None  # shrink images whose shorter side exceeds it
    # apply: turn images as their EXIF orientation says; ignore: leave them as Pillow's and
    # torchvision's plain loading would.
    exif: Literal["apply", "ignore"] = "apply"
    split: str | None = None  # name of the split, where the source has none of its own
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None  # of a source without val
    outside: Literal["refuse", "ignore"] = "refuse"  # images that lie in no class folder
    shard_samples: Count | None = None  # None: shards of about 150 MB, at least 4
    workers: Count | None = None  # processes; None: the cores this process may use
    max_rejected: Natural = 0  # bad images to accept; they are listed in rejected.jsonl
    max_pixels: Count = 100_000_000  # an image with more is refused unread
    max_image_bytes: Count = 200_000_000


_ADAPTER: TypeAdapter[ConvertConfig] = TypeAdapter(ConvertConfig)
_FREE = ("workers", "max_rejected")  # options that no byte of the result depends on


def parse_convert_overrides(overrides: list[str]) -> ConvertConfig:
    """`["quality=85"]` -> a checked config. Raises: ConfigError with one line a problem."""
    values = parse_overrides(overrides)
    try:
        config = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, ConvertConfig)) from None
    validate(config)
    return config


def validate(config: ConvertConfig) -> None:
    """Rules that join several options. Raises: ConfigError."""
    problems = []
    for key in ("name", "split"):
        value = getattr(config, key)
        if value is not None and not NAME_PATTERN.fullmatch(value):
            problems.append(f"{key} = {value}: use letters, digits, '_' and '-' (at most 100)")
    if config.split is not None and "-" in config.split:
        problems.append(f"split = {config.split}: use letters, digits and '_'")
    if config.longer_side and config.shorter_side:
        problems.append(f"shorter_side = {config.shorter_side}: give it or longer_side, not both")
    if config.split is not None and config.val_fraction is not None:
        problems.append(f"val_fraction = {config.val_fraction}: makes its own split names; drop "
                        "the option split")
    if problems:
        raise ConfigError("\n".join(problems))


def convert(source: str, dst: Path, config: ConvertConfig, progress: bool = False) -> Manifest:
    """Convert `source` into the data set directory `dst`, or finish an interrupted conversion.

    Raises: ConfigError where the source, the options or `dst` are at fault; ConvertError where a
    worker failed or more images than `max_rejected` are unusable.
    """
    validate(config)
    dst = Path(dst)
    try:
        opened = open_source(source)
    except SourceError as error:
        raise ConfigError(str(error)) from None
    finished = _already_there(opened, source, dst, config)
    if finished is not None:
        log.info("%s: is complete already; nothing to do", dst)
        return finished
    dst.mkdir(parents=True, exist_ok=True)
    with _only_one(dst):
        plan = prepare(opened, source, dst, config)
        run(plan, config.workers or len(os.sched_getaffinity(0)), progress)
        return finish(plan, source, config)


def prepare(opened: Source, source: str, dst: Path, config: ConvertConfig) -> Plan:
    """The plan in `dst` where it belongs to this very conversion, else a new one."""
    options = asdict(config) | {key: None for key in _FREE}
    options["encoding"] = _image_encoding(opened, config)
    identity = {"options": options, "source": opened.fingerprint(), "kind": opened.kind,
                "codec": codec_versions()}
    plan = load_plan(dst)
    if plan is not None:
        if plan.fingerprint == json.loads(json.dumps(identity)):
            return plan
        log.warning("%s: the unfinished conversion in it was of another source or other options; "
                    "starting anew", dst)
        _remove_shards(plan)
    known = DIGITAL_BYTES if options["encoding"] == "raw" and opened.pixels else None
    try:
        return make_plan(opened, dst, options, json.loads(json.dumps(identity)),
                         split=config.split, val_fraction=config.val_fraction,
                         shard_samples=config.shard_samples, outside=config.outside,
                         known_classes=None, bytes_an_image=known, name=source)
    except SourceError as error:
        shutil.rmtree(WorkPaths.of(dst).root, ignore_errors=True)
        raise ConfigError(str(error)) from None


DIGITAL_BYTES = 3072.0  # 32 x 32 RGB


def codec_versions() -> dict[str, str | None]:
    """What the stored bytes depend on besides source and options."""
    return {"pillow": PIL.__version__, "libjpeg-turbo": jpeg.libjpeg_version()}


def encoding_of(plan: Plan) -> Encoding:
    options = plan.options
    return Encoding(image=options["encoding"], raw_fraction=options["raw_fraction"],
                    longer_side=options["longer_side"], shorter_side=options["shorter_side"],
                    quality=options["quality"], keep=options["keep"],
                    exif=options["exif"], max_pixels=options["max_pixels"])


def run(plan: Plan, workers: int, progress: bool, shards: list[ShardId] | None = None) -> None:
    """Make the shards that are not done yet."""
    everything = plan.shards() if shards is None else shards
    todo = [shard for shard in everything if read_record(plan, shard) is None]
    total = sum(_planned(plan, shard) for shard in everything)
    missing = sum(_planned(plan, shard) for shard in todo)
    if len(todo) < len(everything):
        log.info("%s: %d of %d shards are done already", plan.dst,
                 len(everything) - len(todo), len(everything))
    with Ticker(f"convert {plan.dst.name}", total, "images", progress) as ticker:
        ticker.skip(total - missing)
        if not todo:
            return
        if workers > 1 and len(todo) > 1:
            run_shards(plan, todo, workers, ticker.add)
            return
        reader = open_reader(plan.reader, plan.options["max_image_bytes"])
        for shard in todo:
            try:
                convert_shard(plan, shard, reader, encoding_of(plan), lambda name: ticker.add(1))
            except (SourceError, OSError) as error:
                raise ConvertError(f"{shard}: {error}") from None


def _planned(plan: Plan, shard: ShardId) -> int:
    first, last = plan.split(shard.split).rows(shard.index)
    return last - first


def finish(plan: Plan, source: str, config: ConvertConfig) -> Manifest:
    """Statistics over all records, rejected.jsonl, and the manifest last."""
    records = {}
    for shard in plan.shards():
        record = read_record(plan, shard)
        if record is None:
            raise ConvertError(f"{shard}: is not converted yet; run the same command again")
        records[shard] = record
    paths = DatasetPaths(plan.dst)
    rejected = _write_rejected(plan, records, paths)
    if rejected > config.max_rejected:
        raise ConvertError(
            f"{rejected} of {sum(split.samples for split in plan.splits)} images could not be "
            f"used, more than max_rejected = {config.max_rejected}; {paths.rejected} names them "
            f"with reasons. Repair them, or run again with max_rejected={rejected}")
    splits = {}
    for split in plan.splits:
        shards = tuple(
            Shard(file=str(shard), samples=record.samples, bytes=record.bytes,
                  sha256=record.sha256)
            for shard, record in records.items() if shard.split == split.name and record.samples)
        if not shards:
            raise ConvertError(f"split {split.name!r}: not one image of it could be used")
        splits[split.name] = Split(samples=sum(shard.samples for shard in shards), shards=shards)
    trained = "train" if "train" in splits else plan.splits[0].name
    mean, std = _mean_std([record for shard, record in records.items() if shard.split == trained])
    sizes = {record.image_size for record in records.values() if record.samples}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    pixel_mean = _write_pixel_mean(plan, records, trained, paths) if size else None
    manifest = Manifest(
        format_version=FORMAT_VERSION, name=config.name or plan.dst.resolve().name,
        classes=plan.classes, splits=splits,
        encoding={key: plan.options[key] for key in
                  ("encoding", "raw_fraction", "keep", "quality", "longer_side", "shorter_side",
                   "exif")}
        | {"codec": plan.fingerprint["codec"]},
        mean=mean, std=std, image_size=size, pixel_mean_sha256=pixel_mean,
        source=source_record(plan, source) | {
            "measured_images": sum(record.measured for shard, record in records.items()
                                   if shard.split == trained),
            "rejected": rejected, "files": extra_files(paths)})
    manifest = sealed(manifest)
    for split in plan.splits:
        for leftover in (plan.dst / split.name).glob(".*.tmp"):  # of attempts that were killed
            leftover.unlink(missing_ok=True)
    write_atomically(paths.manifest, dump_manifest(manifest).encode())
    shutil.rmtree(plan.work.root)
    return manifest


def extra_files(paths: DatasetPaths) -> dict[str, str]:
    """SHA-256 of the files beside the shards that the manifest has no field for."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (paths.rejected,) if path.exists()}


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with a hash of itself, so that `verify` notices a flipped bit in it, too."""
    return changed(manifest, source=manifest.source | {"seal": seal_of(manifest)})


def seal_of(manifest: Manifest) -> str:
    unsealed = {key: value for key, value in manifest.source.items() if key != "seal"}
    return manifest_fingerprint(changed(manifest, source=unsealed))


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    return replace(cast(Any, manifest), **fields)


def source_record(plan: Plan, source: str) -> dict[str, Any]:
    return {"kind": plan.kind, "name": _source_name(source), "listing_sha256": plan.key,
            "split": plan.options["split"], "val_fraction": plan.options["val_fraction"],
            "ignored_files": plan.ignored}


def _source_name(source: str) -> str:
    return Path(source).resolve().name


def _image_encoding(opened: Source, config: ConvertConfig) -> str:
    if config.encoding != "auto":
        return config.encoding
    return "raw" if opened.pixels else "jpeg"


def _already_there(opened: Source, source: str, dst: Path,
                   config: ConvertConfig) -> Manifest | None:
    """The manifest where `dst` holds this data set already. Raises: ConfigError where it holds
    something else."""
    paths = DatasetPaths(dst)
    if dst.exists() and not dst.is_dir():
        raise ConfigError(f"DST = {dst}: is a file; name a directory")
    if paths.manifest.exists():
        manifest = load_manifest(dst)
        same = (manifest.source.get("kind") == opened.kind
                and manifest.source.get("name") == _source_name(source)
                and manifest.source.get("split") == config.split
                and manifest.source.get("val_fraction") == config.val_fraction
                and all(manifest.encoding.get(key) == value for key, value in (
                    asdict(config) | {"encoding": _image_encoding(opened, config)}).items()
                    if key in manifest.encoding))
        if not same:
            raise ConfigError(f"DST = {dst}: holds another data set ({manifest.name}, made from "
                              f"{manifest.source.get('name')}); name another directory")
        for split in manifest.splits.values():
            for shard in split.shards:
                file = dst / shard.file
                if not file.is_file() or file.stat().st_size != shard.bytes:
                    raise ConfigError(f"DST = {dst}: its shard {shard.file} is missing or cut "
                                      "off; remove the directory and convert again")
        return manifest
    if dst.is_dir() and any(dst.iterdir()) and not WorkPaths.of(dst).root.exists():
        raise ConfigError(f"DST = {dst}: is not empty and holds no unfinished conversion; name "
                          "another directory")
    return None


def _remove_shards(plan: Plan) -> None:
    for shard in plan.shards():
        plan.shard_path(shard).unlink(missing_ok=True)


@contextmanager
def _only_one(dst: Path) -> Iterator[None]:
    """Hold the directory; a second conversion into it is refused, not mixed in."""
    handle = os.open(dst, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"DST = {dst}: another conversion is writing into it") from None
        yield
    finally:
        os.close(handle)


def _write_rejected(plan: Plan, records: dict[ShardId, Record], paths: DatasetPaths) -> int:
    lines = [json.dumps({"split": shard.split, "image": name, "reason": reason})
             for shard, record in records.items() for name, reason in record.rejected]
    if lines:
        write_atomically(paths.rejected, ("\n".join(lines) + "\n").encode())
    else:
        paths.rejected.unlink(missing_ok=True)
    return len(lines)


def _mean_std(records: list[Record]) -> tuple[tuple[float, float, float],
                                              tuple[float, float, float]]:
    """Per channel in [0, 1], from integer sums, so that no order of shards can change a bit."""
    count = sum(record.pixels for record in records)
    assert count, "no image was measured"
    mean, std = [], []
    for channel in range(3):
        total = sum(record.sums[channel] for record in records)
        squares = sum(record.squares[channel] for record in records)
        mean.append(total / count / 255)
        variance = (squares * count - total * total) / (count * count)
        std.append(variance ** 0.5 / 255)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _write_pixel_mean(plan: Plan, records: dict[ShardId, Record], split: str,
                      paths: DatasetPaths) -> str | None:
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
