"""What a conversion made of its source, in sentences that a person reads at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.encode import facts
from resnet_dist.data.shards.manifest import Manifest

SHOWN = 8  # kinds of files or reasons


def account(manifest: Manifest) -> list[str]:
    """Of the part that was converted last: warnings first, what was left out last."""
    part: dict[str, Any] = (manifest.source.get("appended") or [manifest.source])[-1]
    lines = facts.sentences(part.get("facts", {}), manifest.encoding.get("white"))
    if part.get("rejected_reasons"):
        lines.append(f"rejected {sum(part['rejected_reasons'].values()):,} images, see "
                     f"rejected.jsonl: {by_number(part['rejected_reasons'])}")
    if part.get("ignored_suffixes"):
        lines.append(f"skipped {part['ignored_files']:,} files that are no images by their names: "
                     f"{by_number(part['ignored_suffixes'])}")
    return lines


def kind_of(reason: str) -> str:
    """A reason without what differs from image to image."""
    return reason.partition(" (")[0].partition("; ")[0]


def by_number(counts: Mapping[str, int]) -> str:
    """`.txt (3), .csv (1)`: the commonest first, and how many kinds more."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{kind} ({count:,})" for kind, count in ordered[:SHOWN]]
    if len(ordered) > SHOWN:
        shown.append(f"and {len(ordered) - SHOWN} kinds more")
    return ", ".join(shown)
