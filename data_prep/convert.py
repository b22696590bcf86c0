"""`resnet-dist convert`: a source of images becomes a directory of FFCV shards.

scan -> plan on disk -> shards, by any number of workers -> statistics -> dataset.json, the commit
marker. Every step can be killed: the same command again goes on where it stopped, and the bytes are
the same as without the kill.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL
import xxhash

from data_prep.conversion.finish import finish
from data_prep.conversion.plan import Plan, ShardId, WorkPaths, load_plan, make_plan
from data_prep.conversion.pool import ConvertError, run_shards
from data_prep.conversion.progress import Ticker
from data_prep.conversion.shown import shown
from data_prep.conversion.write import convert_shard, encoding_of, read_record
from data_prep.encode import jpeg
from data_prep.options import ENCODING, FREE, ConvertConfig, parse_convert_overrides, validate
from data_prep.sources.archives import WebDataset
from data_prep.sources.arrays import CIFAR_PIXELS
from data_prep.sources.classes import ClassList, read_classes
from data_prep.sources.folders import open_reader, open_source
from data_prep.sources.found import Source, SourceError
from data_prep.sources.labels import read_labels
from data_prep.sources.readings import Said
from data_prep.sources.remote import located
from resnet_dist.config.schema import ConfigError
from resnet_dist.data.shards.manifest import Manifest, load_manifest
from resnet_dist.run.paths import DatasetPaths

__all__ = ["ConvertConfig", "ConvertError", "convert", "parse_convert_overrides"]

log = logging.getLogger(__name__)
# Of our own code: raised when the same source and options give other bytes. 2: JPEGs that are
# shrunk stay in their own colours, without a detour over RGB.
ENCODER = "2"
IMAGES_A_WORKER = 256  # less work than this is done before another process has started


def convert(source: str, dst: Path, config: ConvertConfig, progress: bool = False,
            tell: Callable[[dict[str, Any]], None] | None = None) -> Manifest:
    """Convert `source` into the data set directory `dst`, or finish an interrupted conversion.

    Args:
        tell: shown the plan, as `shown.shown` tells it, before the first image is converted.

    Raises: ConfigError where the source, the options or `dst` are at fault; ConvertError where a
    worker failed or more images than `max_rejected` are unusable.
    """
    dst = Path(dst)
    opened, done = opened_for(source, dst, config)
    if done is not None:
        log.info("%s: is complete already; nothing to do", dst)
        return done
    with only_one(dst):
        plan = prepare(opened, source, dst, config)
        if tell is not None:
            tell(shown(plan))
        run(plan, config.workers, progress)
        return finish(plan, name_of(dst, config), config.max_rejected)


def opened_for(source: str, dst: Path, config: ConvertConfig, make: bool = True
               ) -> tuple[Source, Manifest | None]:
    """The source, and the manifest where there is nothing left to do; else makes `dst`."""
    validate(config)
    if Path(source).is_dir() and dst.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"DST = {dst}: lies inside SOURCE = {source} and would be a class of it "
                          "the next time; name a directory outside")
    if sys.getfilesystemencoding() != "utf-8":
        raise ConfigError(f"PYTHONUTF8 = {os.environ.get('PYTHONUTF8')}: file names would be read "
                          f"as {sys.getfilesystemencoding()}; unset it, or set LC_ALL=C.UTF-8")
    try:
        opened = open_source(source, config.take)
        if config.image is not None:
            if not isinstance(opened, WebDataset):
                raise SourceError(f"image = {config.image}: chooses among the images of a "
                                  f"WebDataset key, and {source} is none; drop it")
            opened.image = config.image.removeprefix(".")
    except SourceError as error:
        raise ConfigError(str(error)) from None
    done = _already_there(opened, source, dst, config)
    if done is not None:
        _refuse_changed(opened, source, dst, config, done)
    if done is None and make:
        dst.mkdir(parents=True, exist_ok=True)
    return opened, done


def name_of(dst: Path, config: ConvertConfig) -> str:
    return config.name or dst.resolve().name


def prepare(opened: Source, source: str, dst: Path, config: ConvertConfig,
            base: Manifest | None = None) -> Plan:
    """The plan in `dst` where it belongs to this very conversion, else a new one.

    Args:
        base: of the data set to append to, where it is not in `dst`.

    Raises: ConfigError where the source has two readings, or makes no sense to learn from.
    """
    base = load_manifest(dst) if config.append and base is None else base
    if base is not None:
        config = _with_encoding_of(base, config)
    options = asdict(config) | {key: None for key in FREE}
    options["encoding"] = _image_encoding(opened, config)
    try:
        known = read_classes(Path(config.classes)) if config.classes else None
        if base is not None:
            known = ClassList(base.classes, known.also if known else {})
        labels = read_labels(located(config.labels), path_column=config.labels_path,
                             label_column=config.labels_label,
                             split_column=config.labels_split).rows if config.labels else None
        identity = json.loads(json.dumps({
            "options": options, "source": opened.fingerprint(), "kind": opened.kind,
            "classes": [known.names, known.also] if known else None, "codec": codec_versions(),
            "labels": xxhash.xxh3_128_hexdigest(repr(labels).encode()) if labels else None}))
        plan = load_plan(dst)
        if plan is not None:
            if plan.identity == identity:
                return plan
            log.warning("%s: the unfinished conversion in it was of another source or other "
                        "options; starting anew", dst)
            _remove_shards(plan, keep=set(base.splits) if base else set())
        said = Said(split=config.split, splits=config.splits, class_depth=config.class_depth,
                    label_from=re.compile(config.label_from) if config.label_from else None,
                    labels=labels, outside=config.outside)
        raw_pixels = opened.pixels and options["encoding"] == "raw"
        return make_plan(opened, dst, options, identity, said=said, known_classes=known,
                         bytes_an_image=float(CIFAR_PIXELS) if raw_pixels else None, name=source,
                         heif_allowed=config.max_rejected,
                         taken_splits=tuple(base.splits) if base else ())
    except SourceError as error:
        shutil.rmtree(WorkPaths(dst).root, ignore_errors=True)
        raise ConfigError(str(error)) from None


def planned(source: str, dst: Path, config: ConvertConfig) -> dict[str, Any]:
    """What `convert` would do, as `shown.shown` tells it; nothing is left on disk.

    Raises: ConfigError as `convert` does.
    """
    opened, done = opened_for(source, dst, config, make=False)
    base = load_manifest(dst) if config.append else None
    with tempfile.TemporaryDirectory(prefix="resnet-dist-plan-") as folder:
        plan = prepare(opened, source, Path(folder), config, base)
        return shown(plan) | {"already_converted": done is not None}


def codec_versions() -> dict[str, str | None]:
    """What the stored bytes depend on besides source and options."""
    return {"encoder": ENCODER, "pillow": PIL.__version__, "libjpeg-turbo": jpeg.libjpeg_version()}


def run(plan: Plan, workers: int | None, progress: bool,
        shards: list[ShardId] | None = None) -> None:
    """Make the shards that are not done yet. Raises: ConvertError."""
    everything = plan.shards() if shards is None else shards
    todo = [shard for shard in everything if read_record(plan, shard) is None]
    total = sum(map(plan.samples, everything))
    missing = sum(map(plan.samples, todo))
    if len(todo) < len(everything):
        log.info("%s: %d of %d shards are done already", plan.dst,
                 len(everything) - len(todo), len(everything))
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), -(-missing // IMAGES_A_WORKER))
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


@contextmanager
def only_one(dst: Path, shared: bool = False, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the directory; a second conversion into it is refused, not mixed in. Tasks of one
    conversion share it."""
    handle = os.open(dst, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(f"DST = {dst}: another conversion is writing into it; wait "
                                      "for it, or end it first") from None
                time.sleep(0.5)
        yield
    finally:
        os.close(handle)


def _image_encoding(opened: Source, config: ConvertConfig) -> str:
    if config.encoding != "auto":
        return config.encoding
    return "raw" if opened.pixels else "jpeg"


def _with_encoding_of(base: Manifest, config: ConvertConfig) -> ConvertConfig:
    """The options of the data set that is appended to. Raises: ConfigError where others were
    asked for."""
    default, taken = ConvertConfig(), dict[str, Any]()
    for key in ENCODING:
        asked, there = getattr(config, key), base.encoding.get(key)
        if asked not in (getattr(default, key), there):
            raise ConfigError(f"{key} = {asked}: the data set was made with {key}={there}, and its "
                              "splits should agree; drop the option")
        taken[key] = there
    return replace(config, **taken)


def _already_there(opened: Source, source: str, dst: Path,
                   config: ConvertConfig) -> Manifest | None:
    """The manifest where `dst` holds this data set already. Raises: ConfigError where it holds
    something else."""
    paths = DatasetPaths(dst)
    if dst.exists() and not dst.is_dir():
        raise ConfigError(f"DST = {dst}: is a file; name a directory")
    if not paths.manifest.exists():
        if config.append:
            raise ConfigError(f"append = true: {dst} holds no finished data set to append to")
        if dst.is_dir() and any(dst.iterdir()) and not WorkPaths(dst).root.exists():
            raise ConfigError(f"DST = {dst}: is not empty and holds no unfinished conversion; "
                              "name another directory")
        return None
    manifest = load_manifest(dst)
    asked: dict[str, Any] = {"kind": opened.kind, "name": Path(source).resolve().name,
                             "split": config.split, "val_fraction": config.val_fraction}
    sources = [manifest.source, *manifest.source.get("appended", [])]
    if config.append:
        if not any(asked.items() <= known.items() for known in sources):
            return None
    elif not asked.items() <= manifest.source.items() or any(
            manifest.encoding.get(key) != value for key, value in (
                {key: getattr(config, key) for key in ENCODING}
                | {"encoding": _image_encoding(opened, config)}).items()):
        raise ConfigError(f"DST = {dst}: holds another data set ({manifest.name}, made from "
                          f"{manifest.source.get('name')}); name another directory, or append=true "
                          "to add a split to it")
    for split in manifest.splits.values():
        for shard in split.shards:
            file = dst / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise ConfigError(f"DST = {dst}: its shard {shard.file} is missing or cut off; "
                                  "remove the directory and convert again")
    return manifest


def _refuse_changed(opened: Source, source: str, dst: Path, config: ConvertConfig,
                    there: Manifest) -> None:
    """Raises: ConfigError where the source has changed since, or is read otherwise now."""
    sources = [there.source, *there.source.get("appended", [])]
    with tempfile.TemporaryDirectory(prefix="resnet-dist-plan-") as folder:
        plan = prepare(opened, source, Path(folder), replace(config, append=False))
        same = plan.classes == there.classes or config.append
        if not same or plan.listing not in (known.get("listing_sha256") for known in sources):
            what = "images" if same else "classes"
            raise ConfigError(f"DST = {dst}: holds another data set: {source} has other {what} "
                              "now, or is read otherwise; name another directory")


def _remove_shards(plan: Plan, keep: set[str]) -> None:
    for shard in plan.shards():
        if shard.split not in keep:
            plan.shard_path(shard).unlink(missing_ok=True)
