"""metrics.jsonl: the curves of a run, one JSON object a line. Imports no torch.

Every line has `step`, `kind` ("train", "val" or "event") and `time` (seconds since 1970); a train
or val line has the figures of that step, an event line `what`, `text` and `value`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resnet_dist.run.atomic import write_atomically


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, oldest first; a torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1]:
        line = json.loads(raw)
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite the file without torn lines and lines past `step`, atomically."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    write_atomically(path, "".join(kept))
