"""Parquet files with encoded images and labels, as data sets are distributed today.

The image column is binary, or a struct with the field `bytes`; the label column holds numbers,
whose names may stand in the metadata that Hugging Face's `datasets` writes, or names themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.sources.found import (
    Found,
    Group,
    Located,
    Source,
    SourceError,
    Unreadable,
    number_classes,
    refuse_size,
    split_in_name,
)
from data_prep.sources.found import split_names as canonical_splits
from data_prep.sources.remote import located, open_file

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "webp", "bytes")
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls", "class", "target", "class_id", "wnid")
READ_ROWS = 64  # decoded from a column at a time: bounds memory whatever the row groups are


class ParquetFiles(Source):
    """One or more files; a file's split is in its name or its folder's."""

    kind = "parquet"

    def __init__(self, paths: Sequence[Located]) -> None:
        super().__init__(paths, reader="parquet", column="", struct=False)

    def scan(self) -> Iterator[Found]:
        splits = {path: split_in_name(path) for path in self.paths}
        names = canonical_splits(split for split in splits.values() if split)
        listed: tuple[str, ...] | None = None
        seen: set[str] = set()
        columns = None
        for container, path in enumerate(self.paths):
            file = _open(path)
            image, label, struct = _columns(file, path)
            if columns not in (None, (image, struct)):
                raise SourceError(f"{path}: its columns differ from those of {self.paths[0]}")
            columns = (image, struct)
            self.reader |= {"column": image, "struct": struct}
            listed = listed or _label_names(file, label)
            split = names.get(splits[path] or "", "train")
            row = 0
            for batch in file.iter_batches(batch_size=8192, columns=[label]):
                for value in batch.column(0).to_pylist():
                    group: Group = ""  # unlabelled
                    if value is not None and value != "" and not (
                            isinstance(value, int) and value < 0):
                        if listed and isinstance(value, int) and value >= len(listed):
                            raise SourceError(f"{path}: row {row} has label {value} of "
                                              f"{len(listed)} named classes")
                        name = listed[value] if listed and isinstance(value, int) else str(value)
                        seen.add(name)
                        group = (split, name)
                    yield Found(group, f"{path.name}:{row}", container, row, -1)
                    row += 1
        self.classes = listed or number_classes(seen)


def _open(path: Located) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_file(path), memory_map=False, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{path}: not a Parquet file ({reason[:200]})") from None


def _columns(file: Any, path: Located) -> tuple[str, str, bool]:
    """(image column, label column, is the image a struct)."""
    import pyarrow

    schema = file.schema_arrow
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise SourceError(f"{path}: has columns {', '.join(schema.names)}; an image column "
                          f"({', '.join(IMAGE_COLUMNS)}) and a label column "
                          f"({', '.join(LABEL_COLUMNS)}) are needed")
    kind = schema.field(image).type
    struct = pyarrow.types.is_struct(kind)
    if struct and "bytes" not in [kind.field(i).name for i in range(kind.num_fields)]:
        raise SourceError(f"{path}: the struct {image!r} has no field 'bytes'")
    if not struct and not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise SourceError(f"{path}: column {image!r} holds {kind}, not encoded images")
    _refuse_empty(file, path, image, struct)
    _refuse_label(schema.field(label).type, label, path)
    return image, label, struct


def _refuse_empty(file: Any, path: Located, image: str, struct: bool) -> None:
    """Raises: SourceError where the first rows hold paths in place of images."""
    first = next(file.iter_batches(batch_size=READ_ROWS, columns=[image]), None)
    if first is None or not first.num_rows:
        return
    values = first.column(0).field("bytes") if struct else first.column(0)
    if values.null_count == len(values):
        raise SourceError(f"{path}: its column {image!r} holds no images, only where they were; "
                          "write it with the images inside (datasets: "
                          "`embed_external_files=True`), or convert the folder of images with "
                          "labels=FILE")


def _refuse_label(kind: Any, label: str, path: Located) -> None:
    """Raises: SourceError where a label is not one class."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    told = {types.is_list: "lists of labels, and an image is of one class here",
            types.is_large_list: "lists of labels, and an image is of one class here",
            types.is_floating: "fractions, and classes are counted; round them to int64, or bin "
                               "what is to be measured",
            types.is_struct: "records; keep the one field that names the class",
            types.is_temporal: "times; give names or numbers of classes"}
    for holds, what in told.items():
        if holds(kind):
            raise SourceError(f"{path}: column {label!r} holds {what}")


def _label_names(file: Any, label: str) -> tuple[str, ...] | None:
    metadata = file.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    unique = len(set(names)) == len(names) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and unique else None


class ParquetReader:
    """Reads rows forwards, a few at a time; going back opens the row group again."""

    def __init__(self, reader: dict[str, Any], max_bytes: int) -> None:
        self._paths = [located(path) for path in reader["containers"]]
        self._column = reader["column"]
        self._struct = reader["struct"]
        self._max_bytes = max_bytes
        self._container = -1
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._first = self._next = 0  # rows of the batch at hand

    def read(self, name: str, container: int, offset: int, size: int) -> bytes:
        import pyarrow

        try:
            if container != self._container or not self._first <= offset:
                self._seek(container, offset)
            while offset >= self._next:
                self._batch = next(self._batches)
                self._first, self._next = self._next, self._next + self._batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"{self._paths[container]}: damaged near row {offset} "
                              f"({reason[:200]})") from None
        except StopIteration:
            raise SourceError(f"{self._paths[container]}: is shorter than when it was "
                              "scanned") from None
        column = self._batch.column(0)
        value = column[offset - self._first]
        if self._struct and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise Unreadable("is missing (null)")
        buffer = value.as_buffer()
        refuse_size(buffer.size, self._max_bytes)
        return buffer.to_pybytes()

    def _seek(self, container: int, row: int) -> None:
        if container != self._container:
            self._file = _open(self._paths[container])
            self._container = container
        groups = self._file.metadata.num_row_groups
        first, group = 0, 0
        while group < groups and first + self._file.metadata.row_group(group).num_rows <= row:
            first += self._file.metadata.row_group(group).num_rows
            group += 1
        self._batches = self._file.iter_batches(
            batch_size=READ_ROWS, row_groups=list(range(group, groups)), columns=[self._column],
            use_threads=False)
        self._first = self._next = first
