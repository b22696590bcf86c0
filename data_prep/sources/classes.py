"""Names of classes in the order of their labels: the same list whatever the source is.

A given list rules; then the source's own; then names that are all numbers in the order of numbers,
and others in that of their characters. `order` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.sources.found import SourceError, printable
from data_prep.sources.readings import Place


@dataclass(frozen=True)
class ClassList:
    """Names in the order of labels, and what else they are called in a source."""

    names: tuple[str, ...]
    also: dict[str, str] = field(default_factory=dict)


def read_classes(path: Path) -> ClassList:
    """A class a line; `FOLDER<TAB>CLASS` where the source's folders are called otherwise.

    Raises: SourceError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"classes = {path}: cannot be read ({error})") from None
    rows = [[part.strip() for part in line.split("\t")] for line in lines if line.strip()]
    names = tuple(dict.fromkeys(row[-1] for row in rows))
    folders = [row[0] for row in rows]
    if not names or len(set(folders)) != len(folders) or any(len(row) > 2 for row in rows) or (
            len(names) < len(rows) and all(len(row) == 1 for row in rows)):
        raise SourceError(f"classes = {path}: write every class name once, a line each, or "
                          "FOLDER<TAB>CLASS with every folder once")
    return ClassList(names, {row[0]: row[1] for row in rows if len(row) == 2})


def order_classes(own: Sequence[str] | None, known: ClassList | None, places: Sequence[Place],
                  order: str | None, name: str) -> tuple[tuple[str, ...], list[int]]:
    """The classes, and the label of each place. Raises: SourceError where a name is unknown."""
    raw = list(dict.fromkeys(place.class_name for place in places))
    found = list(dict.fromkeys(map(printable, raw)))
    if len(found) < len(raw):
        raise SourceError(f"SOURCE = {name}: two of its class folders, one with bytes that are no "
                          "UTF-8, read the same; rename one")
    if known is None:
        classes = tuple(own) if own and order is None else ordered(found, order)
        also: dict[str, str] = {}
    else:
        classes, also = known.names, known.also
        if own and not also and _numbers(own) and not _numbers(classes):
            if len(own) > len(classes):
                raise SourceError(f"SOURCE = {name}: has labels up to {len(own) - 1}, and "
                                  f"{len(classes)} class names are given")
            also = dict(zip(own, classes, strict=False))
        elif own and tuple(own) != classes and not also:
            raise SourceError(f"SOURCE = {name}: its {len(own)} classes differ from the "
                              f"{len(classes)} given ones")
    labels = {each: label for label, each in enumerate(classes)}
    unknown = sorted({each for each in found if also.get(each, each) not in labels})
    if unknown:
        raise SourceError(f"SOURCE = {name}: class {unknown[0]!r} is not among the "
                          f"{len(classes)} known ones ({len(unknown)} such); a file "
                          "classes=FILE with lines FOLDER<TAB>CLASS says which are which")
    names = [printable(place.class_name) for place in places]
    return classes, [labels[also.get(each, each)] for each in names]


def ordered(names: Sequence[str], order: str | None) -> tuple[str, ...]:
    """`name`: by characters; `natural`: numbers in them by value; `file`: as they came; None: all
    numbers by value, else by characters."""
    if order == "file":
        return tuple(names)
    if order == "natural" or (order is None and _numbers(names)):
        return tuple(sorted(names, key=_natural))
    return tuple(sorted(names))


def _numbers(names: Sequence[str]) -> bool:
    return bool(names) and all(name.isdecimal() and name.isascii() for name in names)


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part)
            for part in parts], name
