"""Files that list images with their labels: tables that people write, and those that ship with data
sets.

In: a file. Out: path as written -> (label, split or None). Columns are taken by their usual names;
where those do not tell, the user names them. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.found import Located, SourceError
from data_prep.sources.remote import open_file

MAX_BYTES = 1 << 30
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img",
                "image_path", "image_name", "image_id", "imageid", "relative_im_path", "fname",
                "id", "name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "wnid", "breed",
                 "species", "y", "labelname", "class_id")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "data set")
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".jp2")
CUB = {"images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"}

Row = tuple[str, str, str | None]  # path, label, split


@dataclass(frozen=True)
class LabelFile:
    kind: str  # its format in words
    rows: dict[str, tuple[str, str | None]]


def read_labels(path: Located, *, path_column: str | None = None, label_column: str | None = None,
                split_column: str | None = None) -> LabelFile:
    """The labels in a file. Raises: SourceError naming the file, the line and the remedy."""
    named = [path_column, label_column, split_column]
    try:
        if (isinstance(path, Path) and path.name in CUB
                and (path.parent / "image_class_labels.txt").exists()):
            return _unique(path, "CUB-200's lists", _cub(path.parent))
        with open_file(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise SourceError(f"labels = {path}: has more than {MAX_BYTES} bytes")
        if path.suffix.lower() == ".mat":
            return _unique(path, "Stanford's lists", _mat(path, data))
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"labels = {path}: is not UTF-8 text ({error}); save it as UTF-8"
                          ) from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"labels = {path}: cannot be read ({error})") from None
    if path.name == "val_annotations.txt":
        return _unique(path, "tiny-imagenet's annotations", val_annotations(text))
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return _unique(path, "JSON", _json(path, text, named))
    return _unique(path, *_table(path, text, named))


def val_annotations(text: str) -> list[Row]:
    """Lines of file, class and a box, parted by tabs. Source: tiny-imagenet-200's own file."""
    return [(row[0], row[1], None) for line in text.splitlines() if (row := line.split("\t"))[0]]


def solution(text: str) -> list[Row]:
    """ImageId,PredictionString; the string is class and box, over and over, all of one class.
    Source: Kaggle's ImageNet object localisation challenge, its data page."""
    rows = list(csv.reader(io.StringIO(text)))[1:]
    return [(row[0], row[1].split()[0], None) for row in rows if row]


def _unique(path: Located, kind: str, rows: Iterable[Row]) -> LabelFile:
    found: dict[str, tuple[str, str | None]] = {}
    for name, label, split in rows:
        name = name.strip().replace("\\", "/").removeprefix("./")
        label = label.strip()
        if not name or not label:
            raise SourceError(f"labels = {path}: image {name!r} has the label {label!r}; complete "
                              "the row or remove it")
        if found.setdefault(name, (label, split)) != (label, split):
            raise SourceError(f"labels = {path}: {name} has two labels, {found[name][0]!r} and "
                              f"{label!r}; an image is of one class here")
    if not found:
        raise SourceError(f"labels = {path}: names no image")
    return LabelFile(kind, found)


def _table(path: Located, text: str, named: list[str | None]) -> tuple[str, list[Row]]:
    first = text.partition("\n")[0]
    comma = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    if comma not in first and " " in first.strip():
        comma = " "  # FILE LABEL, as Caffe's lists
    try:
        table = [row for row in csv.reader(io.StringIO(text), delimiter=comma) if any(row)]
    except csv.Error as error:
        raise SourceError(f"labels = {path}: not a table ({error})") from None
    if not table or len(table[0]) < 2:
        raise SourceError(f"labels = {path}: holds one column; a table of path and label is needed "
                          "(numbers alone are labels of images in an order that it does not tell)")
    head = [cell.strip() for cell in table[0]]
    if len(head) == 2 and not any(named) and head[0].lower().endswith(ENDINGS):
        return "a table without a header", [(row[0], row[-1], None) for row in _even(path, table)]
    at = _columns(path, head, named)
    body = _even(path, table)[1:]
    if "PredictionString" in head and head[at[1]] == "PredictionString":
        return "Kaggle's solution", solution(text)
    return "a table", [(row[at[0]], row[at[1]], row[at[2]] if at[2] is not None else None)
                       for row in body]


def _even(path: Located, table: list[list[str]]) -> list[list[str]]:
    for number, row in enumerate(table, 1):
        if len(row) != len(table[0]):
            raise SourceError(f"labels = {path}: row {number} has {len(row)} cells, the first "
                              f"{len(table[0])}; quote what holds the separator")
    return table


def _columns(path: Located, head: Sequence[str], named: list[str | None]
             ) -> tuple[int, int, int | None]:
    """Places of path, label and split. Raises: SourceError where a name does not tell."""
    places: list[int | None] = []
    usual = (PATH_COLUMNS, (*LABEL_COLUMNS, "predictionstring"), SPLIT_COLUMNS)
    for key, said, names in zip(("labels_path", "labels_label", "labels_split"), named, usual,
                                strict=True):
        if said is not None:
            if said not in head:
                raise SourceError(f"{key} = {said}: {path} has the columns {', '.join(head)}")
            places.append(head.index(said))
            continue
        low = [cell.lower() for cell in head]
        found = [low.index(name) for name in names if name in low]
        if key == "labels_label" and len(found) > 1:
            raise SourceError(f"labels = {path}: {' and '.join(head[i] for i in found)} may both "
                              "be the label; say labels_label=COLUMN")
        if not found and key != "labels_split":
            raise SourceError(f"labels = {path}: which of its columns {', '.join(head)} is the "
                              f"{key.partition('_')[2]}? Say {key}=COLUMN")
        places.append(found[0] if found else None)
    assert places[0] is not None
    assert places[1] is not None
    return places[0], places[1], places[2]


def _json(path: Located, text: str, named: list[str | None]) -> list[Row]:
    try:
        if path.suffix.lower() == ".json":
            tree = json.loads(text)
        else:
            tree = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise SourceError(f"labels = {path}: not JSON ({error})") from None
    if isinstance(tree, dict) and all(isinstance(value, str | int) for value in tree.values()):
        return [(name, str(value), None) for name, value in tree.items()]
    if not isinstance(tree, list) or not tree or not all(isinstance(row, dict) for row in tree):
        raise SourceError(f"labels = {path}: expected {{path: label}}, or a list of records")
    head = list(tree[0])
    at = _columns(path, head, named)
    keys = [head[place] if place is not None else None for place in at]
    rows = []
    for number, row in enumerate(tree, 1):
        values = [row.get(key) if key is not None else None for key in keys]
        if not isinstance(values[0], str) or not isinstance(values[1], str | int):
            raise SourceError(f"labels = {path}: record {number} has the path {values[0]!r} and "
                              f"the label {values[1]!r}")
        rows.append((values[0], str(values[1]), str(values[2]) if values[2] else None))
    return rows


def _cub(folder: Path) -> list[Row]:
    """Source: CUB-200-2011's README, "images and class labels"."""
    def listed(name: str) -> dict[str, str]:
        file = folder / name
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {row[0]: row[1] for line in lines if len(row := line.split(maxsplit=1)) == 2}

    labels, classes = listed("image_class_labels.txt"), listed("classes.txt")
    training = listed("train_test_split.txt")
    splits = {"1": "train", "0": "test"}
    return [(name, classes.get(labels[number], labels[number]),
             splits.get(training.get(number, "")))
            for number, name in listed("images.txt").items()]


def _mat(path: Located, data: bytes) -> list[Row]:
    """Source: the development kits of Stanford Cars (`annotations`) and Dogs (`file_list`)."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(f"labels = {path}: MATLAB files need scipy; pip install scipy") from None
    try:
        tree: dict[str, Any] = loadmat(io.BytesIO(data), squeeze_me=True)
    except Exception as error:  # loadmat raises anything on a damaged file
        raise SourceError(f"labels = {path}: cannot be read ({error})") from None
    if "annotations" in tree:
        fields = tree["annotations"].dtype.names
        name = next(each for each in ("relative_im_path", "fname") if each in fields)
        names = {index + 1: str(each) for index, each in enumerate(tree.get("class_names", ()))}
        return [(str(row[name]), names.get(int(row["class"]), str(int(row["class"]))),
                 None if "test" not in fields else "test" if int(row["test"]) else "train")
                for row in tree["annotations"].flat]
    if "file_list" in tree:
        return [(str(name), str(int(label)), None) for name, label in
                zip(tree["file_list"].flat, tree["labels"].flat, strict=True)]
    raise SourceError(f"labels = {path}: holds {', '.join(k for k in tree if k[0] != '_')}; "
                      "`annotations` or `file_list` with `labels` is needed")
