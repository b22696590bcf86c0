"""What a person should know of how images were read, counted: in a shard's record, then over all.

In: `Facts` of one image. Out: counts that add up in any order, and sentences at the end of a
conversion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DIM = 1 << 15  # 16-bit images whose values all lie below would be shown at under half brightness


@dataclass(frozen=True)
class Facts:
    turned: bool = False  # by its EXIF orientation
    unended: bool = False  # a JPEG with every coefficient, but without its end marker
    several: bool = False  # the first picture of several: MPO, animations, pages
    deep: tuple[int, int] | None = None  # lowest and highest of its 16-bit values
    clipped: bool = False  # some of these lie above `white`


PLAIN = Facts()


def count(facts: Facts, into: Counter[str]) -> None:
    """Add one image."""
    for key in ("turned", "unended", "several", "clipped"):
        if getattr(facts, key):
            into[key] += 1
    if facts.deep is not None:
        low, high = facts.deep
        into["deep"] += 1
        if high < DIM:
            into["dim"] += 1
            into["dim_low"] = min(low, into.get("dim_low", low))
            into["dim_high"] = max(high, into.get("dim_high", high))


def total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Over shards, in any order."""
    sums: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            there = sums.get(key)
            sums[key] = (value if there is None else min(value, there) if key == "dim_low"
                         else max(value, there) if key == "dim_high" else value + there)
    return dict(sorted(sums.items()))


def sentences(sums: Mapping[str, int], white: int | None) -> list[str]:
    """What `sums` means, a line each; what asks for an act first."""
    lines = []
    if sums.get("dim") and white is None:
        high = sums["dim_high"]
        lines.append(f"WARNING: {_images(sums['dim'])} of {sums['deep']:,} with 16 bits a pixel "
                     f"have values from {sums['dim_low']:,} to {high:,} of 65,535 alone, and are "
                     "nearly black as they are; convert again with "
                     f"white={(1 << high.bit_length()) - 1 or 1}, the value that is to be white")
    if sums.get("clipped"):
        lines.append(f"WARNING: {_images(sums['clipped'])} have values above white = {white:,}, "
                     "which are white now; give a larger one if they should not be")
    told = {"turned": "turned as EXIF says",
            "unended": "kept though the end marker is missing: every coefficient is there",
            "several": "the first of several in a file"}
    for key, words in told.items():
        if sums.get(key):
            verb = "was" if sums[key] == 1 else "were"
            lines.append(f"{_images(sums[key])} {verb} {words}")
    return lines


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number:,} images"
