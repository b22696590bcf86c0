"""A plan as it is shown before anything is converted: to a person, or to a script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.conversion.account import by_number
from data_prep.conversion.plan import Plan


def shown(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for a person or a script."""
    labels = np.load(plan.work.rows, mmap_mode="r")["label"]
    sizes = np.bincount(labels, minlength=len(plan.classes))
    smallest, largest = int(np.argmin(sizes)), int(np.argmax(sizes))
    splits = {}
    for split in plan.splits:
        of = np.unique(labels[split.start:split.start + split.samples])
        splits[split.name] = {"images": split.samples, "classes": len(of)}
    return {"shape": plan.told["shape"], "why": plan.told["why"], "splits": splits,
            "classes": len(plan.classes), "first": list(plan.classes[:3]),
            "last": list(plan.classes[-2:]),
            "smallest": {"class": plan.classes[smallest], "images": int(sizes[smallest])},
            "largest": {"class": plan.classes[largest], "images": int(sizes[largest])},
            "left_out": plan.told["left_out"], "skipped_files": plan.ignored,
            "warnings": plan.told["warnings"]}


def lines(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of a plan as `shown` tells it."""
    few = told["classes"] <= 5
    names = told["first"] + (["..."] if not few else []) + (
        told["last"] if not few else told["last"][max(0, 5 - told["classes"]):])
    ends = [f"{told[end]['class']} ({told[end]['images']:,})" for end in ("smallest", "largest")]
    rows = [("shape", told["shape"] + (f": {told['why']}" if told["why"] else ""))]
    rows += [(f"split {name}", f"{split['images']:,} images of {split['classes']:,} classes")
             for name, split in told["splits"].items()]
    rows += [("classes", f"{told['classes']:,}: {', '.join(names)}"),
             ("class sizes", f"{ends[0]} to {ends[1]}")]
    if told["left_out"]:
        rows.append(("left out", by_number(told["left_out"])))
    if told["skipped_files"]:
        rows.append(("skipped", by_number(told["skipped_files"])))
    return rows + [("warning", warning) for warning in told["warnings"]]
