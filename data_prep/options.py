"""The options of `resnet-dist convert`: one strict dataclass, the only place of their defaults."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from resnet_dist.config.explain import explain
from resnet_dist.config.load import parse_overrides
from resnet_dist.config.rules import NAME_PATTERN
from resnet_dist.config.schema import ConfigError, Count, Fraction, Natural, Positive


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
    # Of images with 16 bits a pixel: the value that is shown white, e.g. 4095 for 12 bits of X-ray;
    # None: 65535.
    white: Annotated[int, Field(ge=1, le=65535)] | None = None
    split: str | None = None  # name of the split, where the source has none of its own
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None  # of a source without val
    append: bool = False  # add the source's splits to the finished data set in DST
    # How the source is to be read, where it does not tell by itself; docs/data.md.
    labels: str | None = None  # file with the images' labels
    labels_path: str | None = None  # its columns, where their names do not tell
    labels_label: str | None = None
    labels_split: str | None = None
    label_from: str | None = None  # regular expression on an image's path with a group `label`
    splits: dict[str, str] | Literal["none"] | None = None  # {train: DIR}; none: all are classes
    class_depth: Annotated[int, Field(ge=1, le=8)] | None = None  # folders that name a class
    take: Literal["folders", "archives"] | None = None  # of a directory that holds both
    image: str | None = None  # ending of the image of a WebDataset key that has several: seg.png
    classes: str | None = None  # file of class names in the order of labels; FOLDER<TAB>CLASS
    order: Literal["name", "natural", "file"] | None = None  # None: numbers by value, else name
    outside: Literal["refuse", "ignore"] = "refuse"  # images that lie in no class folder
    # What makes no sense to learn from, and is wanted all the same.
    accept: tuple[Literal["one_class", "few_images", "odd_names", "unequal_classes",
                          "empty_classes"], ...] = ()
    shard_samples: Count | None = None  # None: shards of about 150 MB, at least 4
    workers: Count | None = None  # processes; None: the cores there are, fewer for little work
    max_rejected: Natural = 0  # bad images to accept; they are listed in rejected.jsonl
    max_pixels: Count = 100_000_000  # an image with more is refused unread
    max_image_bytes: Count = 200_000_000
    # With --slurm: a job array of `slurm_tasks`, each with `workers` processes (None: 8).
    slurm_tasks: Count = 8
    slurm_partition: str | None = None
    slurm_account: str | None = None
    slurm_minutes: Count = 240
    slurm_mem_gb: Positive | None = None  # None: 0.75 GB a worker


_ADAPTER: TypeAdapter[ConvertConfig] = TypeAdapter(ConvertConfig)
# Options that no byte of the shards depends on.
FREE = ("name", "workers", "max_rejected", "slurm_tasks", "slurm_partition", "slurm_account",
        "slurm_minutes", "slurm_mem_gb")
# Options that are the data set's own: appended splits take them over.
ENCODING = ("encoding", "raw_fraction", "keep", "quality", "longer_side", "shorter_side", "exif",
            "white")


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
    if config.labels and config.label_from:
        problems.append(f"label_from = {config.label_from}: give it or labels, not both")
    if config.label_from is not None:
        try:
            if "label" not in re.compile(config.label_from).groupindex:
                raise re.error("has no group (?P<label>...)")
        except re.error as error:
            problems.append(f"label_from = {config.label_from}: {error}; e.g. "
                            "label_from='(?P<label>[a-z]+)[.][0-9]+[.]jpg$'")
    for split in config.splits if isinstance(config.splits, dict) else ():
        if not NAME_PATTERN.fullmatch(split) or "-" in split:
            problems.append(f"splits = {split}: use letters, digits and '_'")
    if config.longer_side and config.shorter_side:
        problems.append(f"shorter_side = {config.shorter_side}: give it or longer_side, not both")
    if config.split is not None and config.val_fraction is not None:
        problems.append(f"val_fraction = {config.val_fraction}: makes its own split names; drop "
                        "the option split")
    if problems:
        raise ConfigError("\n".join(problems))
