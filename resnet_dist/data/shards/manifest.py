"""`dataset.json`, the commit marker of a data set directory, as typed objects.

`data_prep` writes it last; the reader, `submit` and `verify` trust nothing that it does not name.
Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from resnet_dist.config.schema import Config, ConfigError, Section
from resnet_dist.run.paths import DatasetPaths

FORMAT_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+/shard-\d{5}\.beton$")]


@dataclass(frozen=True, kw_only=True)
class Shard(Section):
    file: RelativeName  # relative to the data set directory
    samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Sha256
    # `beton.index_digest` of the shard; None in data sets written before it was recorded.
    index_xxh3: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None


@dataclass(frozen=True, kw_only=True)
class Split(Section):
    samples: Annotated[int, Field(ge=0)]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest(Section):
    format_version: int
    name: str
    classes: tuple[str, ...]  # label i is classes[i]
    splits: dict[str, Split]
    encoding: dict[str, Any]  # how images were stored; see data_prep/convert.py
    mean: tuple[float, float, float]  # RGB in [0, 1], over the training split
    std: tuple[float, float, float]
    image_size: tuple[int, int] | None  # (height, width) where all images share one
    pixel_mean_sha256: Sha256 | None  # of pixel_mean.npy, where image_size is small
    source: dict[str, Any]  # kind, fingerprint

    @property
    def num_classes(self) -> int:
        return len(self.classes)


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def load_manifest(root: Path | str) -> Manifest:
    """Read and check `root/dataset.json`.

    Raises: ConfigError where the directory is missing, unfinished, or of another format.
    """
    paths = DatasetPaths(Path(root))
    try:
        text = paths.manifest.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not paths.root.is_dir():
            raise ConfigError(f"data.path = {root}: no such directory; "
                              f"`resnet-dist convert SOURCE {root}` makes it") from error
        raise ConfigError(f"data.path = {root}: has no dataset.json, so its conversion did not "
                          "finish; run the same `resnet-dist convert` again") from error
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(f"data.path = {root}: dataset.json is of format version {version}, "
                              f"this program reads {FORMAT_VERSION}; convert again")
        manifest = _ADAPTER.validate_json(text, strict=True)
    except (ValidationError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.path = {root}: dataset.json is damaged ({reason}); "
                          "convert again") from None
    for name, split in manifest.splits.items():
        if split.samples != sum(shard.samples for shard in split.shards):
            raise ConfigError(f"data.path = {root}: dataset.json is damaged (split {name!r} "
                              "does not add up); convert again")
    return manifest


def dump_manifest(manifest: Manifest) -> str:
    """Canonical text: the same manifest gives the same bytes."""
    return json.dumps(_ADAPTER.dump_python(manifest, mode="json"), indent=1, sort_keys=True) + "\n"


def manifest_fingerprint(manifest: Manifest) -> str:
    """SHA-256 of the canonical text; recorded with a run, so that a swapped data set is noticed."""
    return hashlib.sha256(dump_manifest(manifest).encode()).hexdigest()


def check_dataset(config: Config) -> Manifest:
    """The manifest of `data.path`, once it is known to fit the configuration.

    Raises: ConfigError naming key, value and remedy.
    """
    if config.data.path is None:
        raise ConfigError("data.path = null: name a data set directory, e.g. data=data/imagenet")
    manifest = load_manifest(config.data.path)
    if "train" not in manifest.splits or not manifest.splits["train"].samples:
        raise ConfigError(f"data.path = {config.data.path}: has no split 'train'; convert it again")
    if config.eval.split not in manifest.splits:
        raise ConfigError(f"eval.split = {config.eval.split}: not in {config.data.path}, which has "
                          f"{', '.join(sorted(manifest.splits))}; pick one of them")
    paths = DatasetPaths(Path(config.data.path))
    if config.augment.normalize == "pixel" and not paths.pixel_mean.exists():
        raise ConfigError(f"augment.normalize = pixel: {config.data.path} has images of several "
                          "sizes and so no mean image; use augment.normalize=mean")
    for name in ("train", config.eval.split):
        for shard in manifest.splits[name].shards:
            file = paths.root / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                found = "missing" if size is None else f"{size:,} bytes"
                raise ConfigError(f"data.path = {config.data.path}: {shard.file} is {found}, "
                                  f"expected {shard.bytes:,} bytes; copy it again or convert again"
                                  ) from (FileNotFoundError(errno.ENOENT, found) if size is None
                                          else None)
    return manifest


def legible(classes: tuple[str, ...], has: Container[int], letters: int) -> tuple[str, ...]:
    """Class names for a picture whose font `has` these code points, at most `letters` of each: one
    with other letters (another script, control characters, bytes that are no text) is shown by its
    number, `class 7`, not as boxes that all look alike."""
    return tuple((name if len(name) <= letters else f"{name[:letters - 1]}.")
                 if name.isprintable() and all(ord(letter) in has for letter in name)
                 else f"class {label}" for label, name in enumerate(classes))


# What the font that Pillow brings with it can draw.
PILLOW_LETTERS = frozenset(range(32, 127)) | frozenset(range(161, 256))
