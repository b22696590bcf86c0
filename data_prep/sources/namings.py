"""Labels of images that lie in one folder: in their names, or in a file that data sets ship with.

In: names, files. Out: (how in words, name -> label). Only what has one meaning is taken; any other
file is for `labels=FILE`, any other naming for `label_from=REGEX`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import partial

from data_prep.sources.found import Side, SourceError
from data_prep.sources.labels import Row, solution, val_annotations

Naming = tuple[str, Callable[[str], str | None]]
MAX_BYTES = 1 << 28

# Each says the label in one place of the name and nowhere else.
PATTERNS = (
    ("names end in a WordNet id, as on the hub", re.compile(r".+_(n\d{8})\.\w+")),
    ("names begin with a WordNet id", re.compile(r"(n\d{8})_\d+\.\w+")),
    ("names are LABEL.NUMBER, as Kaggle's dogs and cats",
     re.compile(r"([A-Za-z][A-Za-z_ -]*)\.\d+\.\w+")),
)


def by_name(names: list[str]) -> Naming | None:
    """A pattern that all names follow with at least two labels."""
    for how, pattern in PATTERNS:
        labels = set()
        for name in names:
            found = pattern.fullmatch(name)
            if found is None:
                break
            labels.add(found[1])
        else:
            if len(labels) > 1:
                return how, partial(_first, pattern)
    return None


def by_label_file(folder: str, names: Callable[[str], list[str]], side: Side,
                  source: str) -> Naming | None:
    """The file beside `folder`, or above it, that names its images.

    Raises: SourceError where it names some of them, and others not.
    """
    for path, read in sorted(side.items(), key=lambda item: -len(item[0])):
        leaf = path.rpartition("/")[2]
        if leaf not in _READERS:
            continue
        how, parse = _READERS[leaf]
        try:
            rows = {_stem(name): label for name, label, _ in
                    parse(read(MAX_BYTES).decode("utf-8-sig"))}
        except (UnicodeDecodeError, csv.Error, IndexError) as error:
            raise SourceError(f"{path}: cannot be read as {how} ({error})") from None
        present = [name for name in names(folder) if _stem(name) in rows]
        if not present:
            continue
        missing = sorted({*names(folder)} - {*present})
        if missing:
            raise SourceError(f"SOURCE = {source}: {path} has no label for {len(missing)} of "
                              f"{len(missing) + len(present)} images of {folder}, the first "
                              f"{missing[0]!r}; complete it, or name another with labels=FILE")
        return f"labels from {leaf}", partial(_row, rows)
    return None


def _first(pattern: re.Pattern[str], name: str) -> str | None:
    found = pattern.fullmatch(name)
    return found[1] if found else None


def _row(rows: dict[str, str], name: str) -> str | None:
    return rows.get(_stem(name))


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


_READERS: dict[str, tuple[str, Callable[[str], list[Row]]]] = {
    "val_annotations.txt": ("tiny-imagenet's annotations", val_annotations),
    "LOC_val_solution.csv": ("Kaggle's solution", solution)}
