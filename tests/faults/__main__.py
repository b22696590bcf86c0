"""`make faults`: make the 36 faults, one after the other, and print what followed.

    python -m tests.faults [--only 1,17,26] [--repeat N] [--json PATH] [--markdown PATH]
                           [--scratch DIR]
    python -m tests.faults --show PATH [--markdown PATH]

`--markdown` writes the table as RESULTS.md has it; `--show` makes nothing and shows the rows that
an earlier call wrote to `--json`. `--repeat` makes every chosen fault N times, for the medians.

Needs root and Debian's SLURM packages, for the faults of the cluster, Debian's libfaketime, and
mount namespaces and a writable memory cgroup. Exits with 1 where anything differs from what is
expected.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.faults.ground import Difference, Ground
from tests.faults.sheet import markdown, show
from tests.faults.table import FAULTS, Fault
from tests.slurm.cluster import Cluster, why_not

console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="numbers, separated by commas")
    parser.add_argument("--repeat", type=int, default=1, help="make each so many times")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--scratch", type=Path, help="work here, and leave it")
    parser.add_argument("--show", type=Path, help="make nothing; show the rows of this --json file")
    asked = parser.parse_args()
    rows = json.loads(asked.show.read_text()) if asked.show else make(asked)
    show(console, rows)
    if asked.markdown:
        asked.markdown.write_text(markdown(rows))
    return int(not all(row["as_expected"] for row in rows))


def make(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the chosen faults; their rows, which are in the asked file as soon as they are known."""
    numbers = {int(word) for word in asked.only.split(",")} if asked.only else None
    chosen = [fault for fault in FAULTS if numbers is None or fault.number in numbers]
    os.umask(0o022)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended even then
    folder = (asked.scratch or Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    folder.mkdir(exist_ok=True)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="rds-", dir="/tmp")))
    ground = Ground(folder, cache(lambda: _up(cluster)))
    rows: list[dict[str, Any]] = []
    console.print(f"runs and logs: {folder}")
    with cluster.guarded(), closing(ground):
        ground.undisturbed()  # so that no fault's time contains it
        for _ in range(asked.repeat):
            clear(ground)
            for fault in chosen:
                rows.append(judge(fault, ground))
                console.print(f"{fault.number:>2}  {fault.what}: {rows[-1]['seen']} "
                              f"({rows[-1]['seconds']:.0f} s)", highlight=False, markup=False,
                              style=None if rows[-1]["as_expected"] else "red")
                if asked.json:
                    asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def clear(ground: Ground) -> None:
    """Remove what was disturbed; runs that nothing happened to serve again."""
    ground.close()
    for path in (*ground.runs.glob("*"), *ground.folder.glob("data-*"),
                 *ground.folder.glob("*.log")):
        if path.is_dir() and not path.name.startswith("undisturbed"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _up(cluster: Cluster) -> Cluster:
    if reason := why_not():
        raise Difference(f"not made: {reason}")
    started = cluster.script("up")
    if started.returncode:
        raise Difference(f"the local SLURM did not start: {started.stderr}")
    return cluster


def judge(fault: Fault, ground: Ground) -> dict[str, Any]:
    """Make a fault; its row. Whatever goes wrong is a difference."""
    began, seen, problem = time.monotonic(), [], ""
    for make in fault.make:
        try:
            seen.append(make(ground))
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            if not isinstance(error, Difference):
                traceback.print_exc()
    row = {"number": fault.number, "fault": fault.what, "expected": fault.expected,
           "as_expected": not problem, "seen": "; ".join(each.text for each in seen),
           "instead": fault.instead, "seconds": round(time.monotonic() - began, 1)}
    if problem:
        row["seen"] = f"DIFFERS: {problem}"
    for key in ("redone", "recover_s", "notice_s", "start_s"):
        values = [getattr(each, key) for each in seen if getattr(each, key) is not None]
        row[key] = round(max(values), 2) if values else None
    return row


if __name__ == "__main__":
    sys.exit(main())
